#!/bin/sh
# Base images for the Dockerfile where there is no image registry, and the wheels it needs, so that
# `docker build` itself runs without a network. Uses this machine's own apt and pip settings; none of
# them, and no certificate, ends up in an image.
#   baton-base    Debian bookworm with Python: what the image runs on
#   baton-build   the same with venv, g++ and make: what the wheel is built in
# An image that exists is kept; FORCE=1 makes it anew. PYTHON names the python that fetches the wheels.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

image() { # name, packages
    if [ "${FORCE:-0}" != 1 ] && docker image inspect "$1" >/dev/null 2>&1; then return; fi
    echo "making $1" >&2
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    mmdebstrap --quiet --variant=minbase --format=tar --include="$2" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        bookworm "$archive"
    docker import "$archive" "$1" >/dev/null
    rm -f "$archive"
}

image baton-base python3
image baton-build python3,python3-venv,g++,make

for kind in run build; do
    "$PYTHON" deploy/requirements.py "$kind"
done | "$PYTHON" -m pip download --quiet --only-binary :all: --python-version 3.11 \
    -c constraints.txt -d deploy/wheels -r /dev/stdin
