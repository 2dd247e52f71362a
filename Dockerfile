# docker build --target cpu --tag focus-serve:cpu .   serves the embedded demo, without a GPU
# docker build --tag focus-serve .                    serves any supported model on NVIDIA GPUs
# With --build-arg FOCUS_COMMIT="$(git rev-parse HEAD)", the metric focus_build_info says what was built.

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY focus_vllm focus_vllm
COPY server server
COPY loadtest loadtest
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS cpu-environment
COPY requirements-cpu.lock /
# The lock is complete, and PyPI's own build of torch is for CUDA: `make setup` does the same.
RUN python -m venv /opt/focus \
    && /opt/focus/bin/pip install --no-cache-dir --no-deps \
        --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' /requirements-cpu.lock)" \
    && /opt/focus/bin/pip install --no-cache-dir --no-deps --requirement /requirements-cpu.lock
COPY --from=wheel /wheels /wheels
RUN /opt/focus/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.11-slim AS cpu
# vLLM's CPU kernels link libnuma; torch.compile calls g++ for every model but the demo.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 focus
COPY --from=cpu-environment /opt/focus /opt/focus
ARG FOCUS_COMMIT=unknown
ENV PATH=/opt/focus/bin:$PATH FOCUS_COMMIT=$FOCUS_COMMIT
USER 10001
WORKDIR /adapters
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=5m \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://localhost:8000/livez')"]
ENTRYPOINT ["focus-serve"]

FROM vllm/vllm-openai:v0.26.0 AS gpu
RUN useradd --create-home --uid 10001 focus
COPY --from=wheel /wheels /wheels
# The image has every dependency in versions that fit its vLLM.
RUN python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl
ARG FOCUS_COMMIT=unknown
ENV FOCUS_COMMIT=$FOCUS_COMMIT
USER 10001
WORKDIR /adapters
EXPOSE 8000
# Loading 70B weights from a network disk takes that long.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60m \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://localhost:8000/livez')"]
ENTRYPOINT ["focus-serve"]
