# docker build --tag anime-base-trainer .                           for the CPU
# docker build --tag anime-base-trainer --build-arg CUDA=yes .      for an NVIDIA GPU
#
# In the folder that holds the data and configs, and into which runs are written:
# docker run --rm -it --user "$(id -u):$(id -g)" --volume "$PWD:/data" anime-base-trainer \
#     python /trainer/train.py my.yaml                              with a GPU: docker run --gpus all ...
FROM python:3.13-slim

# empty, or "yes" for PyTorch's CUDA build, bitsandbytes and xformers
ARG CUDA=
# where builds of PyTorch for the CPU are; not asked for CUDA's
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

# what make setup reads: other changes of the code install nothing again
WORKDIR /trainer
COPY Makefile constraints.txt pyproject.toml README.md LICENSE ./
COPY scripts/make_venv.sh scripts/
COPY trainer/__init__.py trainer/
RUN PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL="$([ -n "$CUDA" ] || echo "$CPU_INDEX")" make setup CUDA="$CUDA"
COPY . .

# any user may run it: what a run needs to write lies in /data, models of the hub too, and the rest in /tmp
RUN useradd --create-home --uid 1000 trainer && mkdir /data && chown trainer /data
USER 1000
ENV PATH=/trainer/.venv/bin:$PATH HOME=/tmp HF_HOME=/data/.cache/huggingface PYTHONDONTWRITEBYTECODE=1
WORKDIR /data
CMD ["bash"]
