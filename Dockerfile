# One image for every role; the command decides (see docker-compose.yml).
#   BASE_IMAGE    a Debian with Python 3.11
#   BUILD_IMAGE   the same with Python's headers and venv; g++ and make come with apt if missing
#   PIP_NO_INDEX  1: only the wheels in deploy/wheels, no network
#   WITH_TORCH    1: with TORCH, for prefill on another device; on CPU the native engine needs none
ARG BASE_IMAGE=python:3.11-slim
ARG BUILD_IMAGE=${BASE_IMAGE}

FROM ${BUILD_IMAGE} AS build
ARG PIP_NO_INDEX=
ARG WITH_TORCH=0
ARG TORCH=torch==2.13.0
ENV PIP_FIND_LINKS=/src/deploy/wheels PIP_CONSTRAINT=/src/constraints.txt \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN (command -v g++ && command -v make) >/dev/null \
    || (apt-get update && apt-get install -y --no-install-recommends g++ make)
WORKDIR /src
COPY deploy/wheels/ deploy/wheels/
COPY deploy/requirements.py deploy/requirements.py
COPY constraints.txt pyproject.toml ./
RUN python3 -m venv /opt/tools && python3 -m venv /opt/baton \
    && python3 deploy/requirements.py build >/tmp/build.txt \
    && python3 deploy/requirements.py run >/tmp/run.txt \
    && /opt/tools/bin/pip install -q -r /tmp/build.txt \
    && /opt/baton/bin/pip install -q -r /tmp/run.txt \
    && if [ "$WITH_TORCH" = 1 ]; then /opt/baton/bin/pip install -q "$TORCH"; fi
COPY CMakeLists.txt README.md ./
COPY native/ native/
COPY proto/ proto/
COPY policies/ policies/
COPY services/ services/
COPY baton/ baton/
RUN mkdir -p baton/v1 && touch baton/v1/__init__.py \
    && /opt/tools/bin/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. \
       --grpc_python_out=. proto/baton/v1/*.proto \
    && PATH=/opt/tools/bin:$PATH /opt/tools/bin/pip wheel -q --no-build-isolation --no-deps \
       -w /tmp/wheel . \
    && /opt/baton/bin/pip install -q --no-deps /tmp/wheel/*.whl \
    && /opt/baton/bin/pip uninstall -q -y setuptools pip

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 baton \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin baton \
    && install -d -o 10001 -g 10001 /arena /journal /disk
COPY --from=build /opt/baton /opt/baton
COPY models/ /opt/models/
ENV PATH=/opt/baton/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    BATON_MODEL=/opt/models/pico BATON_ARENA_DIR=/arena/kv BATON_JOURNAL_DIR=/journal
USER 10001:10001
CMD ["baton", "--help"]
