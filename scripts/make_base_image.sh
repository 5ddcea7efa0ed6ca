#!/bin/sh
# Base images for the Dockerfile where there is no image registry, and the wheels it needs, so that
# `docker build` itself runs without a network. Uses this machine's own apt and pip settings; none of
# them, and no certificate, ends up in an image.
#   baton-base    Debian bookworm with Python: what the image runs on
#   baton-build   the same with headers, venv, g++ and make: what the wheel is built in
# An image with the same list of packages is kept; FORCE=1 makes it anew. PYTHON fetches the wheels.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

image() { # name, packages
    made_of=$(docker image inspect -f '{{index .Config.Labels "packages"}}' "$1" 2>/dev/null) || true
    if [ "${FORCE:-0}" != 1 ] && [ "$made_of" = "$2" ]; then return; fi
    echo "making $1" >&2
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    mmdebstrap --quiet --variant=minbase --format=tar --include="$2" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        bookworm "$archive"
    docker import -c "LABEL packages=$2" "$archive" "$1" >/dev/null
    rm -f "$archive"
}

image baton-base python3
image baton-build python3,python3-dev,python3-venv,g++,make

for kind in run build; do
    "$PYTHON" deploy/requirements.py "$kind"
done | "$PYTHON" -m pip download -qq --only-binary :all: --python-version 3.11 \
    -c constraints.txt -d deploy/wheels -r /dev/stdin
