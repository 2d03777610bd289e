# prefloop in a container, made by the same two commands as on a bare machine.
#
#   docker build -t prefloop .                                      the CPU build of torch
#   docker build -t prefloop --build-arg DEVICE=cuda .              the build with CUDA; the host gives the driver
#   docker run --rm -v "$PWD/runs:/prefloop/runs" prefloop          make quickstart
#   docker run --rm prefloop make test
#   docker run --rm --gpus all -v "$PWD:/work" -w /work prefloop prefloop run mine.yaml
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# cpu or cuda. The package index has torch with CUDA; its CPU build is on torch's own index, and is taken where both are offered.
ARG DEVICE=cpu
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu

# git: pre-commit and tests of the documentation. A compiler: torch.compile.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git g++ make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /prefloop
COPY . .
RUN case "$DEVICE" in \
      cpu) export PIP_EXTRA_INDEX_URL="$CPU_INDEX" ;; \
      cuda) ;; \
      *) echo "DEVICE is $DEVICE; it must be cpu or cuda" >&2; exit 1 ;; \
    esac \
 && PIP_NO_CACHE_DIR=1 make setup
ENV PATH="/prefloop/.venv/bin:$PATH"
CMD ["make", "quickstart"]
