# megadpo on CPU (gloo): development, tests, the demonstration. Never built yet.
# Build it with `make image-cpu`, which takes the tag from docker/pins.env; then docker run --rm megadpo:cpu make demo
ARG PYTHON_TAG
FROM python:${PYTHON_TAG}

# g++ compiles Megatron's dataset helper and torch's generated code; their version decides no number.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megadpo
COPY . .
RUN make venv
ENV PATH=/opt/megadpo/.venv/bin:$PATH
CMD ["make", "test"]
