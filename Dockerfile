# All three packages as locked, for an NVIDIA GPU, with headless rendering for the simulators (docs/install.md#docker).
#   docker build -t repwam .
#   docker run --rm --gpus all -v "$PWD/runs:/repwam/runs" repwam repwam quickstart
FROM python:3.12-slim-bookworm

# EGL through libglvnd: the driver's library comes from the host (NVIDIA_DRIVER_CAPABILITIES), Mesa's draws without a GPU.
# A compiler: torch.compile builds small C++ and Triton parts when it first runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git libegl1 libgl1 libgl1-mesa-dri libgles2 \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /usr/share/glvnd/egl_vendor.d \
    && echo '{"file_format_version": "1.0.0", "ICD": {"library_path": "libEGL_nvidia.so.0"}}' \
        > /usr/share/glvnd/egl_vendor.d/10_nvidia.json
ENV MUJOCO_GL=egl NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all

COPY --from=ghcr.io/astral-sh/uv:0.8 /uv /bin/uv
WORKDIR /repwam
COPY pyproject.toml uv.lock conftest.py README.md LICENSE ./
COPY packages packages
COPY recipes recipes
# torch brings its CUDA libraries; a driver is all that the host needs.
RUN uv sync --locked --no-dev && uv cache clean
ENV PATH=/repwam/.venv/bin:$PATH
CMD ["repwam", "--help"]
