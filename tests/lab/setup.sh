#!/bin/bash
# Prepares the test lab in .cache/lab: a current QEMU, a Linux kernel, file system tools and a small guest.
#
#   tests/lab/setup.sh            prepare what is missing; returns at once when nothing is
#   tests/lab/setup.sh --force    prepare everything anew
#
# Nothing is installed on the machine. Debian packages of a newer release are fetched and unpacked side by side below
# .cache/lab/root, and its programs run with the C library they were built for, through small wrappers in .cache/lab/bin:
#
#   .cache/lab/bin/          QEMU (with vhost-user and vfio-user devices) and the tools of ext4 and XFS
#   .cache/lab/reference/    qemu-img, qemu-io, qemu-nbd and qemu-storage-daemon of the release that the iotests belong to
#   .cache/lab/guest/        the guest: vmlinux, initramfs.cpio, and initramfs-fio.cpio, which has fio besides
#   .cache/lab/kernel/       all of that kernel's package; its modules are in lib/modules
set -Eeuo pipefail
trap 'echo "lab: error: line $LINENO: $BASH_COMMAND" >&2' ERR
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=$(cd "$here/../.." && pwd)/.cache
lab=$cache/lab
# shellcheck source=tests/lab/debian.sh
. "$here/debian.sh"

# The release everything comes from, and its newer packages, which bring the QEMU that can speak vfio-user.
suite=trixie
newer=$suite-backports

# Programs for which a wrapper is made in bin/.
qemu_programs="qemu-system-x86_64 qemu-img qemu-io qemu-nbd qemu-storage-daemon"
disk_programs="mke2fs e2fsck debugfs dumpe2fs mkfs.xfs xfs_repair xfs_db"
# What goes into the guest: of these, and tools of its drivers; and the kernel modules that the guest may need.
guest_programs="mke2fs e2fsck mkfs.xfs xfs_repair nvme hdparm smartctl sg_inq sg_readcap sg_turs sg_sat_identify sg_requests sg_start sg_verify sg_vpd sg_modes sg_sync"
guest_modules="virtio_blk xfs nvme ahci sd_mod sr_mod sg isofs"

main() {
    [ "${1:-}" != --force ] || { say "preparing everything anew, as asked"; rm -rf "$lab"; }
    mkdir -p "$cache"
    exec 9> "$cache/lab.lock"
    flock 9

    # Two parts, each prepared anew only when what it is made from changes.
    local packages guest
    packages=$(cat "$here/setup.sh" "$here/debian.sh" | sha256sum | cut -c1-16)
    guest=$(cat "$here"/guest/* | sha256sum | cut -c1-16)
    if [ "$(cat "$lab/packages.stamp" 2> /dev/null)" != "$packages" ]; then
        local machine
        machine=$(dpkg --print-architecture)
        [ "$machine" = amd64 ] || die "the lab boots an amd64 guest with programs of the host's kind; this machine is $machine"
        rm -rf "$cache/lab.new" "$cache/lab.old"
        mkdir -p "$cache/lab.new"
        fetch "$cache/lab.new"
        unpack "$cache/lab.new"
        rm -rf "$cache/lab.new/apt"
        echo "$packages" > "$cache/lab.new/packages.stamp"
        # What still runs from the old one goes on.
        [ ! -e "$lab" ] || mv "$lab" "$cache/lab.old"
        mv "$cache/lab.new" "$lab"
        rm -rf "$cache/lab.old"
    fi
    if [ "$(cat "$lab/guest.stamp" 2> /dev/null)" != "$guest" ]; then
        rm -f "$lab/guest.stamp"
        build_guest
        prove
        echo "$guest" > "$lab/guest.stamp"
    fi
    say "ready in $lab: $(head -1 "$lab/version"), reference $(cat "$lab/reference/version"), Linux $(cat "$lab/guest/version")"
}

# fetch FOLDER : downloads the packages
fetch() {
    say "fetching packages of $suite and $newer (about 120 MB)"
    local apt=$1/apt kernel
    debian_apt_init "$apt" deb "$suite" "$newer"
    # With everything they depend on, recommendations left out.
    retry debian_apt get install -qq -y --download-only --no-install-recommends -t "$newer" \
        qemu-system-x86 qemu-utils libblkio1 e2fsprogs liburcu8t64 libinih1 libblkid1 libedit2 cpio kmod zstd xz-utils \
        nvme-cli sg3-utils fio \
        > "$apt/log" 2>&1 || die "apt could not fetch QEMU: $(tail -5 "$apt/log")"
    # Without: they would pull in an interpreter, every network protocol, or a boot loader.
    kernel=$(debian_apt cache depends "linux-image-cloud-amd64/$suite" | awk '$1 == "Depends:" && $2 ~ /^linux-image/ && !seen++ { print $2 }')
    [ -n "$kernel" ] || die "$suite has no linux-image-cloud-amd64"
    (cd "$apt/archives" && retry debian_apt get download -qq "qemu-block-extra/$newer" "xfsprogs/$suite" "busybox-static/$suite" \
        "hdparm/$suite" "smartmontools/$suite" "libcap-ng0/$suite" "ovmf/$suite")
    mkdir -p "$apt/reference" "$apt/kernel"
    (cd "$apt/reference" && retry debian_apt get download -qq "qemu-utils/$suite")
    (cd "$apt/kernel" && retry debian_apt get download -qq "$kernel/$suite")
}

# extract PACKAGE FOLDER MEMBER... : takes those parts of a package that exist in it
extract() {
    local package=$1 folder=$2
    shift 2
    mkdir -p "$folder"
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$folder" --wildcards "$@" 2> /dev/null || true
}

# unpack FOLDER : unpacks the packages beside each other and makes the wrappers
unpack() {
    say "unpacking beside the system"
    local into=$1 package program
    for package in "$into"/apt/archives/*.deb; do
        extract "$package" "$into/root" './usr/bin/*' './usr/sbin/*' './usr/lib/*' './usr/lib64/*' './usr/share/qemu/*' './usr/share/seabios/*' \
            './usr/share/OVMF/*'
    done
    for package in "$into"/apt/reference/*.deb; do
        extract "$package" "$into/reference/root" './usr/bin/*'
        dpkg-deb --field "$package" Version > "$into/reference/version"
    done
    for package in "$into"/apt/kernel/*.deb; do
        extract "$package" "$into/kernel" './boot/*' './usr/lib/modules/*' './lib/modules/*'
    done
    # Older packages have the modules in lib/, newer ones in usr/lib/.
    [ -d "$into/kernel/lib/modules" ] || mv "$into/kernel/usr/lib" "$into/kernel/lib"
    # Block drivers for networks lack their libraries, which were not fetched; the one for vhost-user devices has them.
    find "$into/root/usr/lib/x86_64-linux-gnu/qemu" -name 'block-*.so' ! -name block-blkio.so -delete
    mkdir -p "$into/bin"
    for program in $qemu_programs $disk_programs; do
        wrapper "$into/bin/$program" ../root "$program" ../root
    done
    for program in qemu-img qemu-io qemu-nbd qemu-storage-daemon; do
        wrapper "$into/reference/$program" ../root "$program" root
    done
    cp "$into/root/usr/bin/busybox" "$into/bin/busybox"
    "$into/bin/qemu-system-x86_64" --version > "$into/version"
}

# wrapper FILE LIBRARIES PROGRAM PROGRAMS : makes FILE run PROGRAM of the root PROGRAMS with the libraries of the root
# LIBRARIES, both relative to FILE's folder, so that the whole lab may be moved or cached
wrapper() {
    local file=$1 libraries=$2 program=$3 programs=$4 path firmware='' folder
    folder=$(dirname "$file")
    for path in "$programs"/usr/{bin,sbin}/"$program" none; do
        [ ! -e "$folder/$path" ] || break
    done
    [ "$path" != none ] || die "the packages hold no program $program"
    case $program in qemu-system-*) firmware="-L \"\$lab/$libraries/usr/share/qemu\" -L \"\$lab/$libraries/usr/share/seabios\"" ;; esac
    cat > "$file" <<WRAPPER
#!/bin/sh
lab=\$(dirname "\$(readlink -f "\$0")")
lib=\$lab/$libraries/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="\$lib/qemu"
exec "\$lib/ld-linux-x86-64.so.2" --library-path "\$lib:\$lib/pulseaudio" "\$lab/$path" $firmware "\$@"
WRAPPER
    chmod +x "$file"
}

# in_root PROGRAM ARGUMENT... : runs a program of the unpacked root that needs no wrapper of its own
in_root() {
    local root=$lab/root/usr program=$1 lib=$lab/root/usr/lib/x86_64-linux-gnu file
    shift
    case $program in depmod | modprobe) file=$root/bin/kmod ;; *) file=$root/bin/$program ;; esac
    "$lib/ld-linux-x86-64.so.2" --argv0 "$program" --library-path "$lib" "$file" "$@"
}

# build_guest : makes guest/ from the unpacked packages and from the files in the folder guest/ beside this script
build_guest() {
    say "building the guest"
    local guest=$lab/guest release root lib program module
    lib=$lab/root/usr/lib/x86_64-linux-gnu
    rm -rf "$guest"
    mkdir -p "$guest"
    release=$(basename "$lab"/kernel/boot/vmlinuz-*)
    release=${release#vmlinuz-}
    echo "$release" > "$guest/version"
    kernel_image "$lab/kernel/boot/vmlinuz-$release" "$guest/vmlinux"

    in_root depmod -b "$lab/kernel" "$release"

    # The initramfs: busybox, a few real tools with their libraries, and the modules that the guest needs.
    root=$guest/root
    mkdir -p "$root"/{bin,sbin,proc,sys,dev,tmp,mnt,run,etc} "$root/usr/sbin" "$root/lib/modules/$release"
    cp "$lab/bin/busybox" "$root/bin/busybox"
    cp "$here/guest/init" "$root/init"
    cp "$here/guest/agent" "$root/bin/agent"
    for program in $guest_programs; do
        guest_program "$root" "$program"
    done
    install -D "$lib/ld-linux-x86-64.so.2" "$root/lib64/ld-linux-x86-64.so.2"
    for module in $guest_modules; do
        in_root modprobe -d "$lab/kernel" -S "$release" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'
    done | sort -u | while read -r module; do
        local file=${module#"$lab/kernel"}
        mkdir -p "$root$(dirname "$file")"
        case $file in
            *.xz) in_root xz -dc "$module" > "$root${file%.xz}" ;;
            *.zst) in_root zstd -dcq "$module" > "$root${file%.zst}" ;;
            *) cp "$module" "$root$file" ;;
        esac
    done
    cp "$lab/kernel/lib/modules/$release"/modules.{builtin,builtin.modinfo,order} "$root/lib/modules/$release/"
    in_root depmod -b "$root" "$release"
    archive "$root" > "$guest/initramfs.cpio"
    # fio links with the clients of every network file system, 60 MB: most guests do without. The kernel unpacks
    # archives one after the other.
    mkdir "$guest/fio"
    guest_program "$guest/fio" fio
    { cat "$guest/initramfs.cpio"; archive "$guest/fio"; } > "$guest/initramfs-fio.cpio"
    rm -rf "$root" "$guest/fio"
}

# guest_program FOLDER PROGRAM : copies a program of the unpacked root and its libraries to where a guest has them
guest_program() {
    local into=$1 program=$2 path=$lab/root/usr/sbin/$2 lib=$lab/root/usr/lib/x86_64-linux-gnu name library
    [ -e "$path" ] || path=$lab/root/usr/bin/$program
    [ -e "$path" ] || die "the packages hold no program $program for the guest"
    install -D "$path" "$into/usr/sbin/$program"
    "$lib/ld-linux-x86-64.so.2" --library-path "$lib:$lib/ceph" --list "$path" | awk '$2 == "=>" && $1 !~ "/" { print $1, $3 }' |
        while read -r name library; do
            case $library in /*) ;; *) die "$program needs $name, which was not fetched" ;; esac
            install -D "$library" "$into/lib/x86_64-linux-gnu/$name"
        done
}

# archive FOLDER : the folder as an archive for the kernel, on standard output
archive() {
    (cd "$1" && find . | LC_ALL=C sort | in_root cpio --quiet -o -H newc)
}

# kernel_image BZIMAGE VMLINUX : takes the kernel proper out of its self-extracting wrapping, which emulation would
# need seconds to run at every boot. The fields are those of the x86 boot protocol.
kernel_image() {
    local image=$1 sectors offset length
    sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$image" | tr -d ' ')
    offset=$(od -An -tu4 -j $((0x248)) -N4 "$image" | tr -d ' ')
    length=$(od -An -tu4 -j $((0x24c)) -N4 "$image" | tr -d ' ')
    # The last four bytes of the payload are its unpacked size, not part of the stream.
    dd if="$image" iflag=skip_bytes,count_bytes bs=1M skip=$(((sectors + 1) * 512 + offset)) count=$((length - 4)) status=none |
        in_root zstd -dcq > "$2" || die "the kernel in $image is not compressed with zstd"
}

# prove : every piece that a test relies on is there and starts; what the release no longer has must show here
prove() {
    say "checking the pieces"
    local program devices driver missing lib=$lab/root/usr/lib/x86_64-linux-gnu
    # A library that the host happens to have would hide that another host lacks it.
    for program in "$lab"/root/usr/*bin/* "$lab"/reference/root/usr/bin/*; do
        case " $qemu_programs $disk_programs " in *" $(basename "$program") "*) ;; *) continue ;; esac
        missing=$("$lib/ld-linux-x86-64.so.2" --library-path "$lib:$lib/pulseaudio" --list "$program" 2>&1 |
            awk -v lab="$lab/" '/not found/ || ($2 == "=>" && index($3, lab) != 1) { print $1 }')
        [ -z "$missing" ] || die "$program needs what was not fetched:" $missing
    done
    for program in $qemu_programs; do
        "$lab/bin/$program" --version > /dev/null || die "$program does not start"
    done
    for program in qemu-img qemu-io qemu-nbd qemu-storage-daemon; do
        "$lab/reference/$program" --version > /dev/null || die "the reference $program does not start"
    done
    devices=$("$lab/bin/qemu-system-x86_64" -device help 2> /dev/null)
    for driver in vhost-user-blk-pci vfio-user-pci nvme ich9-ahci; do
        case $devices in *"\"$driver\""*) ;; *) die "$(head -1 "$lab/version") has no device $driver" ;; esac
    done
    case $("$lab/bin/qemu-img" --help) in
        *virtio-blk-vhost-user*) ;;
        *) die "qemu-img has no driver virtio-blk-vhost-user" ;;
    esac
    for driver in OVMF_CODE_4M.fd OVMF_VARS_4M.fd; do
        [ -e "$lab/root/usr/share/OVMF/$driver" ] || die "the package ovmf has no $driver"
    done
    [ "$(head -c 4 "$lab/guest/vmlinux" | tail -c 3)" = ELF ] || die "the kernel did not unpack to an ELF file"
}

main "$@"
