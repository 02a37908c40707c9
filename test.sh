#!/bin/bash
# The one test command. Needs a Debian machine, root (or everything in the list at `host_packages` installed) and Rust.
#
#   ./test.sh                  everything, as continuous integration does
#   ./test.sh SECTION...       some of it: setup format lint docs unit differential iotests counts guest
#
#   setup          installs what is missing: a compiler and Python on the machine, QEMU and a guest below .cache/lab
#   format         cargo fmt --check
#   lint           clippy on every target; a warning is a failure
#   docs           rustdoc; a warning, such as a broken link, is a failure
#   unit           the tests inside the crates, their examples and doc tests, and tests/ without the sections below
#   differential   random operations side by side with qemu-img and qemu-io, which have to agree
#   iotests        QEMU's own test suite, with platter in the place of qemu-img and qemu-io
#   counts         instructions of the hot paths, beside those of benches/counts.txt
#   guest          an unmodified Linux kernel and QEMU's vhost-user client on disks that platter serves
#
# Each section runs, whatever became of those before; the last line counts what passed and what failed.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")" || exit 1
lab=$PWD/.cache/lab
logs=$PWD/.cache/test
all_sections="setup format lint docs unit differential iotests counts guest"

# Programs that the tests need on the machine itself, and the packages that have them.
host_packages="losetup:mount cc:gcc ld:binutils python3:python3 xz:xz-utils valgrind:valgrind"
# Test programs of the root package that have a section of their own.
lab_tests="guest vhost_client"

section_setup() {
    local pair missing=''
    for pair in $host_packages; do
        command -v "${pair%%:*}" > /dev/null || missing="$missing ${pair#*:}"
    done
    # A compiler alone cannot compile: the C library's headers are a package of their own.
    [ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"
    if [ -n "$missing" ]; then
        echo "installing$missing"
        # shellcheck disable=SC2086 # these are several words
        install_packages $missing || return 1
    fi
    for pair in fmt clippy; do
        cargo "$pair" --version > /dev/null || return 1
    done
    tests/lab/setup.sh || return 1
    echo "fetching the crates"
    cargo fetch --locked --quiet
}

# install_packages PACKAGE... : apt, with patience for another apt that runs at the same time
install_packages() {
    local attempt archives
    archives=$(mktemp -d)
    mkdir "$archives/partial"
    for attempt in 1 2 3; do
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
                -o DPkg::Lock::Timeout=300 -o Dir::Cache::archives="$archives" "$@" > "$archives/log" 2>&1 &&
            rm -rf "$archives" && return 0
        echo "attempt $attempt to install $* failed"
        sleep 5
    done
    tail -20 "$archives/log"
    rm -rf "$archives"
    return 1
}

section_format() {
    cargo fmt --all --check
}

section_lint() {
    cargo clippy --workspace --all-targets --locked -- -D warnings &&
        cargo clippy --package block --features tokio-uring --all-targets --locked -- -D warnings
}

section_docs() {
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --features block/tokio-uring --no-deps --locked
}

section_unit() {
    local test targets=()
    # Whatever is in tests/ is run, here or in a section of its own.
    for test in tests/*.rs tests/*/main.rs; do
        test=${test%/main.rs}
        test=$(basename "$test" .rs)
        case " $lab_tests " in
            *" $test "* | *' * '*) ;;
            *) targets+=(--test "$test") ;;
        esac
    done
    [ ! -e src/lib.rs ] || targets+=(--lib)
    local failed=0
    cargo test --workspace --exclude platter --locked --no-fail-fast || failed=1
    # What only exists with this feature: an adapter, its tests and its example.
    cargo test --package block --features tokio-uring --locked --test host uring || failed=1
    cargo test --package block --features tokio-uring --locked --doc host || failed=1
    cargo test --package platter --locked --no-fail-fast --bins --examples "${targets[@]}" || failed=1
    [ $failed -eq 0 ]
}

section_differential() {
    cargo test --package block --locked --no-fail-fast --test differential
}

section_iotests() {
    tests/iotests/run.sh
}

section_counts() {
    cargo bench --package platter-benches --locked --bench counts -- --check
}

section_guest() {
    cargo test --package platter --locked --no-fail-fast --test vhost_client --test guest
}

# count LOG PATTERN : the sum of the numbers before PATTERN in the summaries of test runners
count() {
    grep -E '^(test result:|iotests:)' "$1" | grep -oE "[0-9]+ $2" | awk '{ sum += $1 } END { print sum + 0 }'
}

main() {
    case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0"; exit 0 ;; esac
    local section
    for section in "$@"; do
        case " $all_sections " in
            *" $section "*) ;;
            *) echo "test.sh: no section $section; there are: $all_sections" >&2; exit 2 ;;
        esac
    done
    # shellcheck disable=SC2086 # these are several words
    [ $# -gt 0 ] || set -- $all_sections

    mkdir -p "$logs"
    # Tests that call qemu-img or qemu-io get those of the lab, of one known version.
    export PATH=$lab/reference:$PATH

    local passed=0 failed=0 summary='' start verdict good bad
    for section in "$@"; do
        printf '\n==== %s: %s\n' "$section" "$(sed -n "s/^#   $section  *\(.*\)/\1/p" "$0")"
        start=$SECONDS
        verdict=ok
        "section_$section" 2>&1 | tee "$logs/$section.log" || verdict=FAILED
        good=$(count "$logs/$section.log" passed)
        bad=$(count "$logs/$section.log" failed)
        if [ $((good + bad)) -eq 0 ] || { [ "$verdict" = FAILED ] && [ "$bad" -eq 0 ]; }; then
            # A section without tests of its own counts as one; so does what failed before any test ran.
            case $verdict in ok) good=$((good + 1)) ;; *) bad=$((bad + 1)) ;; esac
        fi
        passed=$((passed + good))
        failed=$((failed + bad))
        summary+=$(printf '%-14s %-7s %5d passed %4d failed %6d s' "$section" "$verdict" "$good" "$bad" $((SECONDS - start)))$'\n'
    done
    printf '\n==== summary (%d s)\n%s\n%d passed, %d failed\n' "$SECONDS" "$summary" "$passed" "$failed"
    [ "$failed" -eq 0 ]
}

main "$@"
