#!/bin/sh
# Installs what scripts/compose_test.py needs from Debian's own archive. Needs root; idempotent.
set -eu
have() { command -v "$1" >/dev/null 2>&1; }
if have dockerd && have docker && have mmdebstrap && { have docker-compose || docker compose version >/dev/null 2>&1; }; then
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends docker.io docker-compose mmdebstrap iptables
