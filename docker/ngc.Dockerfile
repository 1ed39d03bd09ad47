# megadpo on NVIDIA GPUs: NVIDIA's PyTorch image brings torch, NCCL, Transformer Engine and apex, built for each other.
# Written, not yet built; the tag is a starting point, not a tested version.
#   docker build -f docker/ngc.Dockerfile -t megadpo:ngc .
# Versions: the image's tag for what the image brings, constraints.txt for the rest.
ARG NGC_TAG=25.09-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

WORKDIR /opt/megadpo
COPY . .
# Lines of constraints.txt for packages that the image holds are dropped: another torch would break what is built on it.
RUN pip list --format=freeze | cut -d= -f1 | tr '_A-Z' '-a-z' | sort > /tmp/brought \
    && tr '_A-Z' '-a-z' < constraints.txt | awk -F== 'NR==FNR {brought[$1]; next} !($1 in brought)' /tmp/brought - \
        > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt -e .
