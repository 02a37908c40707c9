#!/bin/bash
# Runs QEMU's own device tests, its "qtests", on Platter's device models: no guest, no emulator.
#
#   tests/qtest/run.sh                       every case of pass.txt; all of them have to pass
#   tests/qtest/run.sh ahci-test/ahci/max    these cases: the program, then the case as the program calls it
#   tests/qtest/run.sh --all                 every case of the three suites, to see what does not pass
#
#   -p PROGRAM     the machine to test: a build of the example qtest-x86_64 of vmm-glue; without, it is built and used
#   -j N           cases that run at the same time (as many as there are processors)
#   -t SECONDS     limit for one case (60)
#
# The suite is never part of this repository. It is taken from Debian's source package of the very version that the
# lab's reference programs have (tests/lab/setup.sh), stays in .cache/qtest, and is compiled there without the rest of
# QEMU, against the headers of GLib and the library that the lab's QEMU uses. The programs act as a guest and control a
# machine over two sockets; vmm-glue/examples/qtest-x86_64 is that machine.
set -Eeuo pipefail
trap 'echo "qtest: error: line $LINENO: $BASH_COMMAND" >&2' ERR
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
lab=$top/.cache/lab
cache=$top/.cache/qtest
libraries=$lab/root/usr/lib/x86_64-linux-gnu
# shellcheck disable=SC2034 # read by say
SAY_AS=qtest
# shellcheck source=tests/lab/debian.sh
. "$here/../lab/debian.sh"

# What belongs to each of the programs besides the libraries; the devices' cases are all in one program, with a graph.
programs="ahci-test qos-test"
ahci_test="ahci-test"
qos_test="qos-test nvme-test virtio-blk-test"
# The cases of that program that are about devices of ours.
wanted='^(ahci-test/ahci/|qos-test/pc/.*/(nvme|virtio-blk-pci)/)'
# The driver library, the parts of QEMU that it needs, and QMP's types.
library="qgraph qos_external pci fw_cfg libqos-malloc libqos malloc-spapr libqos-spapr rtas pci-spapr pci-pc malloc-pc
    libqos-pc ahci virtio virtio-blk virtio-mmio virtio-pci virtio-pci-modern x86_64_pc-machine"
objects="json-lexer json-parser json-streamer json-writer qbool qdict qjson qlist qlit qnull qnum qobject qstring"
utilities="cutils error host-utils unicode module osdep oslib-posix qemu-sockets keyval notify id hexdump"
visitors="qapi-dealloc-visitor qapi-visit-core qapi-util qobject-input-visitor"
generated="qapi-types-machine qapi-visit-machine qapi-types-qom qapi-visit-qom qapi-builtin-types qapi-builtin-visit"

main() {
    local program='' jobs limit=60 all=''
    jobs=$(nproc)
    while [ $# -gt 0 ]; do
        case $1 in
            -p) program=$2; shift ;;
            -j) jobs=$2; shift ;;
            -t) limit=$2; shift ;;
            --all) all=yes ;;
            -*) die "unknown option $1; the head of $0 tells what there is" ;;
            *) break ;;
        esac
        shift
    done
    [ -e "$lab/guest.stamp" ] || "$here/../lab/setup.sh"
    mkdir -p "$cache"
    exec 9> "$cache/lock"
    flock 9
    fetch
    compile
    flock -u 9
    [ -n "$program" ] || program=$(build)
    program=$(readlink -f "$program")
    [ -x "$program" ] || die "no program $program"

    # The tests take the architecture from the name. What one run of this script makes is a folder of its own.
    local work
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # now, not then
    trap "rm -rf '$work'" EXIT
    ln -s "$program" "$work/qemu-system-x86_64"
    mkdir "$work/results"
    export cache lab libraries limit work
    if [ $# -gt 0 ]; then
        printf '%s\n' "$@" > "$work/list"
    elif [ -n "$all" ]; then
        cases | grep -E "$wanted" > "$work/list"
    else
        sed 's/ *#.*//; /^$/d' "$here/pass.txt" > "$work/list"
    fi
    [ -s "$work/list" ] || die "no cases to run"

    say "$(wc -l < "$work/list") cases of QEMU $(cat "$cache/version"), $jobs at a time, for $program"
    export -f run_case start
    xargs -a "$work/list" -P "$jobs" -L 1 bash -c 'run_case "$@"' run_case
    local passed failed
    passed=$(find "$work/results" -name '*.pass' | wc -l)
    failed=$(find "$work/results" -name '*.fail' | wc -l)
    echo "qtest: $passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

# build : builds the machine, and gives its path
build() {
    say "building the machine"
    (cd "$top" && cargo build --quiet --package vmm-glue --example qtest-x86_64 --locked)
    echo "${CARGO_TARGET_DIR:-$top/target}/debug/examples/qtest-x86_64"
}

# fetch : takes the tests out of the source package, once, and GLib's headers out of theirs
fetch() {
    local version package
    version=$(cat "$lab/reference/version")
    [ "$(cat "$cache/version" 2> /dev/null)" != "$version" ] || return 0
    say "fetching the source package of QEMU $version (40 MB) and GLib's headers"
    rm -rf "${cache:?}"/{source,glib,apt,build,version}
    mkdir -p "$cache"/{source,glib,apt/packages}
    debian_apt_init "$cache/apt/source" deb-src trixie
    (cd "$cache/apt/packages" && retry debian_apt get source -qq --download-only "qemu=$version" > log 2>&1) ||
        die "the mirror has no source of QEMU $version: $(tail -3 "$cache/apt/packages/log") (tests/lab/setup.sh --force takes newer programs)"
    debian_apt_init "$cache/apt/binary" deb trixie
    (cd "$cache/apt/packages" && retry debian_apt get download -qq libglib2.0-dev libgio-2.0-dev)
    tar -x -C "$cache/source" --strip-components 1 -f "$cache"/apt/packages/qemu_*.orig.tar.* \
        --wildcards '*/tests/qtest' '*/include' '*/qobject' '*/util' '*/qapi' '*/scripts' '*/trace'
    for package in "$cache"/apt/packages/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$cache/glib"
    done
    rm -rf "$cache/apt"
    echo "$version" > "$cache/version"
}

# compile : makes the test programs, once
compile() {
    local stamp source=$cache/source build=$cache/build name program members
    stamp=$({ cat "$cache/version"; sha256sum "$here/run.sh" "$here"/build/*; } | sha256sum)
    [ "$(cat "$build/stamp" 2> /dev/null)" != "$stamp" ] || return 0
    say "compiling the tests"
    rm -rf "$build"
    mkdir -p "$build/qapi" "$build/trace" "$build/objects"
    # What a configuration of QEMU would find out and generate.
    cp "$here"/build/config-host.h "$build/"
    touch "$build/config-poison.h"
    python3 "$source/scripts/qapi-gen.py" -o "$build/qapi" -b "$source/qapi/qapi-schema.json"
    for name in util qapi; do
        (cd "$source" && python3 scripts/tracetool.py --format=h --group=$name --backends=nop \
            "$name/trace-events" "$build/trace/trace-$name.h")
    done
    {
        printf "$source/tests/qtest/libqos/%s.c\n" $library
        printf "$source/tests/qtest/%s.c\n" libqtest libqmp $ahci_test $qos_test
        printf "$source/qobject/%s.c\n" $objects
        printf "$source/util/%s.c\n" $utilities
        printf "$source/qapi/%s.c\n" $visitors
        printf "$build/qapi/%s.c\n" $generated
        echo "$here/build/report.c"
    } > "$build/sources"
    export source build
    export glib=$cache/glib/usr
    export -f compile_one
    xargs -a "$build/sources" -P "$(nproc)" -L 1 bash -c 'compile_one "$@"' compile_one
    for program in $programs; do
        members=${program//-/_}
        # The library was made for a newer C library than the machine may have; both programs run with that one.
        # shellcheck disable=SC2046 # these are several words
        cc -Wl,--gc-sections -Wl,--allow-shlib-undefined -o "$build/$program" \
            $(printf "$build/objects/%s.o\n" ${!members}) \
            $(find "$build/objects" -name '*.o' ! -name '*-test.o') "$libraries/libglib-2.0.so.0"
    done
    echo "$stamp" > "$build/stamp"
}

# compile_one FILE : compiles it; sections on their own, so that what nobody calls may call what is not there
compile_one() {
    local object
    object=$build/objects/$(basename "$1" .c).o
    cc -std=gnu11 -O1 -w -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -ffunction-sections -fdata-sections \
        -I"$build" -I"$source" -I"$source/include" -I"$source/host/include/x86_64" -I"$source/host/include/generic" \
        -I"$source/tests" -I"$source/tests/qtest" -iquote "$build" -iquote "$source" \
        -I"$glib/include/glib-2.0" -I"$glib/lib/x86_64-linux-gnu/glib-2.0/include" -c "$1" -o "$object"
}

# start PROGRAM ARGUMENT... : runs a test program with the lab's libraries
start() {
    local program=$1
    shift
    QTEST_QEMU_BINARY=$work/qemu-system-x86_64 QTEST_QEMU_IMG=$lab/reference/qemu-img \
        "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$cache/build/$program" "$@"
}

# cases : the names of all cases
cases() {
    local program
    for program in $programs; do
        start "$program" -l 2> /dev/null | sed -n "s|^# /x86_64/|$program/|p; s|^/x86_64/|$program/|p" | sort -u
    done
}

# run_case PROGRAM/CASE : runs one case, prints its result and, if it failed, why
run_case() {
    local program=${1%%/*} name=/x86_64/${1#*/} code=0 result=fail file
    file=$work/results/${1//\//_}
    mkdir "$file.tmp"
    # A short path: sockets are in there. Quiet: a case writes what it does.
    (
        export TMPDIR=$file.tmp
        [ ${#TMPDIR} -lt 80 ] || TMPDIR=$(mktemp -d -p "$work")
        export work libraries cache lab program name
        exec timeout --kill-after=5 "$limit" bash -c 'start "$program" -p "$name"'
    ) > "$file.log" 2>&1 < /dev/null || code=$?
    if [ $code -eq 0 ] && grep -aqx "ok 1 $name" "$file.log"; then
        result=pass
    fi
    : > "$file.$result"
    echo "$1 $result"
    [ "$result" = pass ] || grep -aE '^(not ok|Bail|ERROR|qtest-x86_64:|\*\*|.*(death|Broken))' "$file.log" | head -n 4 | cut -c1-300 | sed 's/^/    /'
}

main "$@"
