#!/bin/bash
# Runs QEMU's own test suite for image formats, the iotests, with platter in the place of qemu-img and qemu-io.
#
#   tests/iotests/run.sh                      every test of pass.txt; all of them have to pass
#   tests/iotests/run.sh -f qcow2 001 290     these tests, with this format
#   tests/iotests/run.sh --reference ...      the same with QEMU's own programs, to prove the runner and the list
#
#   -f FORMAT      format of the tests named on the command line (qcow2), or the only one to take from pass.txt
#   -p PROGRAM     the platter to test; without, a release build is made and used
#   -j N           tests that run at the same time (as many as there are processors)
#   -t SECONDS     limit for one test (300)
#   -k             keep what failing tests left behind
#
# The suite is never part of this repository. It is taken from Debian's source package of the very version that the
# lab's reference programs have (tests/lab/setup.sh), and stays in .cache/iotests. A test compares the programs' whole
# output with what QEMU prints, so platter is called by QEMU's names and answers as QEMU does.
set -Eeuo pipefail
trap 'echo "iotests: error: line $LINENO: $BASH_COMMAND" >&2' ERR
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../.." && pwd)
lab=$top/.cache/lab
cache=$top/.cache/iotests
# shellcheck disable=SC2034 # read by say
SAY_AS=iotests
# shellcheck source=tests/lab/debian.sh
. "$here/../lab/debian.sh"

main() {
    local format='' program='' reference='' jobs limit=300 keep=''
    jobs=$(nproc)
    while [ $# -gt 0 ]; do
        case $1 in
            -f) format=$2; shift ;;
            -p) program=$2; shift ;;
            -j) jobs=$2; shift ;;
            -t) limit=$2; shift ;;
            -k) keep=yes ;;
            --reference) reference=yes ;;
            -*) die "unknown option $1; the head of $0 tells what there is" ;;
            *) break ;;
        esac
        shift
    done
    [ -e "$lab/guest.stamp" ] || "$here/../lab/setup.sh"
    fetch

    # The folder that a build of QEMU would be: the programs under test, and real ones for everything else.
    rm -rf "${cache:?}"/{bin,scratch,results}
    mkdir -p "$cache"/{bin,scratch,results}
    ln -s "$lab/reference/qemu-nbd" "$lab/reference/qemu-storage-daemon" "$lab/bin/qemu-system-x86_64" "$cache/bin/"
    if [ -n "$reference" ]; then
        ln -s "$lab/reference/qemu-img" "$lab/reference/qemu-io" "$cache/bin/"
    else
        [ -n "$program" ] || program=$(build)
        program=$(readlink -f "$program")
        [ -x "$program" ] || die "no program $program"
        ln -s "$program" "$cache/bin/qemu-img"
        ln -s "$program" "$cache/bin/qemu-io"
    fi

    # Pairs of a format and a test.
    local list=$cache/list
    if [ $# -gt 0 ]; then
        printf "${format:-qcow2} %s\n" "$@" > "$list"
    else
        sed 's/#.*//' "$here/pass.txt" | awk -v only="$format" 'NF == 2 && (only == "" || $1 == only)' > "$list"
    fi
    [ -s "$list" ] || die "no tests to run"

    say "$(wc -l < "$list") tests of QEMU $(cat "$cache/version"), $jobs at a time, for ${reference:+QEMU itself}${program:-}"
    export cache limit
    export -f run_test say
    xargs -a "$list" -P "$jobs" -L 1 bash -c 'run_test "$@"' run_test
    [ -n "$keep" ] || rm -rf "$cache/scratch"

    local passed failed notrun
    passed=$(grep -lx pass "$cache"/results/*.status | wc -l) || true
    failed=$(grep -Lx -e pass -e 'not run' "$cache"/results/*.status | wc -l) || true
    notrun=$(grep -lx 'not run' "$cache"/results/*.status | wc -l) || true
    # What the list says passes has to pass; a test that finds a reason not to run has not passed.
    [ $# -gt 0 ] || failed=$((failed + notrun))
    echo "iotests: $passed passed, $failed failed, $notrun not run"
    [ "$failed" -eq 0 ] || exit 1
}

# build : makes a release build, as some tests write gigabytes, and gives its path
build() {
    say "building platter"
    (cd "$top" && cargo build --quiet --release --bin platter)
    echo "${CARGO_TARGET_DIR:-$top/target}/release/platter"
}

# fetch : takes the test suite out of the source package, once
fetch() {
    local version
    version=$(cat "$lab/reference/version")
    [ "$(cat "$cache/version" 2> /dev/null)" != "$version" ] || return 0
    say "fetching the source package of QEMU $version (40 MB)"
    rm -rf "$cache"
    mkdir -p "$cache/source"
    debian_apt_init "$cache/apt" deb-src trixie
    (cd "$cache/apt" && retry debian_apt get source -qq --download-only "qemu=$version" > log 2>&1) ||
        die "the mirror has no source of QEMU $version: $(tail -3 "$cache/apt/log") (tests/lab/setup.sh --force takes newer programs)"
    say "unpacking the test suite"
    tar -x -C "$cache/source" --strip-components 1 -f "$cache"/apt/qemu_*.orig.tar.* \
        --wildcards '*/tests/qemu-iotests' '*/python' '*/scripts'
    # Of the packagers' patches only those parts matter that change what the tests expect.
    local patch
    mkdir "$cache/debian"
    tar -x -C "$cache/debian" -f "$cache"/apt/qemu_*.debian.tar.*
    while read -r patch _; do
        case $patch in '' | '#'*) continue ;; esac
        awk '/^--- / { wanted = ($2 ~ "^[^/]*/tests/qemu-iotests/") } wanted' "$cache/debian/debian/patches/$patch" > "$cache/part"
        [ ! -s "$cache/part" ] || (cd "$cache/source" && "$lab/bin/busybox" patch -p1 -i "$cache/part" > /dev/null)
    done < "$cache/debian/debian/patches/series"
    rm -rf "$cache/apt" "$cache/debian" "$cache/part"
    echo "$version" > "$cache/version"
}

# run_test FORMAT TEST : runs one test, prints its result and, if it failed, what differed
run_test() {
    local format=$1 test=$2 name=$1-$2 start=$SECONDS code=0 status sockets
    local suite=$cache/source/tests/qemu-iotests log=$cache/results/$name.log
    sockets=$(mktemp -d)
    mkdir -p "$cache/scratch/$name"
    (
        cd "$cache/scratch/$name"
        export TEST_DIR=$PWD SOCK_DIR=$sockets
        export QEMU_PROG=$cache/bin/qemu-system-x86_64 QEMU_IMG_PROG=$cache/bin/qemu-img QEMU_IO_PROG=$cache/bin/qemu-io
        export QEMU_NBD_PROG=$cache/bin/qemu-nbd QSD_PROG=$cache/bin/qemu-storage-daemon
        exec timeout --kill-after=10 "$limit" \
            python3 "$suite/check" --source-dir "$suite" --build-dir "$cache/bin/none/none" -tap "-$format" "$test"
    ) > "$log" 2>&1 < /dev/null || code=$?
    rm -rf "$sockets"
    case $code in 124 | 137) echo "no end within $limit seconds" >> "$log" ;; esac
    if grep -qx "ok $format $test # SKIP" "$log"; then
        status='not run'
    elif grep -qx "ok $format $test" "$log" && [ "$code" -eq 0 ]; then
        status=pass
    else
        status=fail
    fi
    echo "$status" > "$cache/results/$name.status"
    printf '%-8s %-10s %s (%d s)\n' "$format" "$test" "$status" $((SECONDS - start))
    case $status in
        pass) ;;
        'not run') sed 's/^/    /' "$cache/scratch/$name"/*/"$test.notrun" ;;
        *) grep -v -e '^# [A-Z]' -e '^TAP ' "$log" | head -n 80 | sed 's/^/    /' ;;
    esac
}

main "$@"
