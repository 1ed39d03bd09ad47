# megadpo on NVIDIA GPUs: NVIDIA's PyTorch image brings torch, NCCL, Transformer Engine and apex, built for each other.
# Never built yet. Build it with `make image-ngc`, which takes the tag from docker/pins.env.
ARG NGC_TAG
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

WORKDIR /opt/megadpo
COPY . .
RUN docker/install.sh
# A mistake in the installation appears here rather than on a cluster; neither command should need a GPU.
RUN python tools/train.py --help && python -c "import megadpo.commands.train"
