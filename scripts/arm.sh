#!/bin/sh
# Compiles the engine for 64-bit ARM and for this machine, runs the same passes on every level of both,
# the former under qemu, and compares the bits.
set -eu
out=build/arm
mkdir -p "$out"
flags="-std=c++17 -O2 -fno-math-errno -fno-trapping-math -ffp-contract=off -Wno-psabi -pthread -static"
sources="native/engine.cpp native/packed.cpp native/team.cpp native/arena.cpp native/crc32c.cpp"

build() {  # compiler, program, then level=flags ...
    compiler=$1 program=$2
    shift 2
    objects=""
    for level in "$@"; do
        name=${level%%=*} machine=$(echo "${level#*=}" | tr , ' ')
        "$compiler" $flags $machine -DBATON_LEVEL="$name" -c native/pass.cpp -o "$program-$name.o"
        objects="$objects $program-$name.o"
    done
    "$compiler" $flags native/selfcheck.cpp $sources $objects -o "$program"
}

build aarch64-linux-gnu-g++ "$out/selfcheck-arm" base= dotprod=-march=armv8.2-a+dotprod
qemu-aarch64 "$out/selfcheck-arm" base dotprod > "$out/arm.txt"
if [ "$(uname -m)" = x86_64 ]; then
    build g++ "$out/selfcheck" base= v3=-march=x86-64-v3 v4=-march=x86-64-v4 \
        vnni=-march=x86-64-v4,-mavx512vnni,-mavx512bf16
    "$out/selfcheck" base "" > "$out/here.txt"
fi
test -s "$out/arm.txt"
cat "$out"/arm.txt "$out"/here.txt
sort -u "$out"/arm.txt "$out"/here.txt | awk '{ print $1, $2, $4 }' | sort -u |
    awk '{ if (seen[$1 $2]++) { print "differs: " $0; bad = 1 } } END { exit bad }'
echo "the same bits on all of them"
