# megadpo on CPU (gloo): development, tests, the demonstration. Written, not yet built.
#   docker build -f docker/cpu.Dockerfile -t megadpo:cpu . && docker run --rm megadpo:cpu make demo
# Versions: constraints.txt; here only the Python that it was tried with.
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megadpo
COPY . .
RUN make venv
CMD ["make", "test"]
