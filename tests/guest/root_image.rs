//! A real image: a root file system, compressed by qemu-img, boots through the server with a fresh overlay on top.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::file_system::{FileSystem, manifest};
use crate::lab::{Server, Workplace, check_image, lab, run, tool};
use crate::machine::Guest;

/// Puts a root file system together: an init, busybox, and as its bulk the kernel's package with all its modules.
fn build_tree(root: &Path) {
    let copy = |from: &Path, to: &str| {
        let to = root.join(to);
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        fs::copy(from, to).expect("a copy");
    };
    for folder in [
        "proc", "sys", "dev", "tmp", "mnt", "etc", "bin", "sbin", "lib",
    ] {
        fs::create_dir_all(root.join(folder)).expect("a folder");
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/guest");
    copy(&sources.join("root-init"), "sbin/init");
    copy(&sources.join("agent"), "bin/agent");
    copy(&lab().join("bin/busybox"), "bin/busybox");
    let applets = run(tool("busybox").arg("--list"));
    for applet in applets.lines().filter(|&applet| applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).expect("a link");
    }
    // Compressed modules, which hardly compress again, and one large file that does.
    let modules = lab().join("kernel/lib/modules");
    run(std::process::Command::new("cp")
        .arg("-r")
        .arg(modules)
        .arg(root.join("lib/modules")));
    copy(&lab().join("guest/vmlinux"), "boot/vmlinux");
}

fn boots_from(compression: &str) {
    let workplace = Workplace::new();
    let tree = workplace.file("tree");
    build_tree(&tree);
    let expected = manifest(&tree);
    let raw = workplace.create("root.raw", "raw", "400M");
    run(tool("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(&tree)
        .arg(&raw));

    let base = workplace.file("base.qcow2");
    let option = format!("compression_type={compression}");
    run(tool("qemu-img")
        .args(["convert", "-f", "raw", "-c", "-O", "qcow2", "-o", &option])
        .args([&raw, &base]));
    let untouched = fs::read(&base).expect("the base image");
    let overlay = workplace.create_overlay("overlay.qcow2", &base, "qcow2");

    let mut server = Server::start(&workplace, &overlay, "qcow2");
    let mut guest = Guest::builder().disk(&server).root("/dev/vda").boot();
    assert!(
        guest.ok("mount").contains("/dev/vda on / type ext4"),
        "the root is elsewhere"
    );
    let bulk = "boot lib/modules bin sbin";
    let command = format!("cd / && find {bulk} -type f | LC_ALL=C sort | xargs sha256sum");
    let same = |manifest: &str| {
        let mut lines: Vec<&str> = manifest.lines().collect();
        lines.sort_unstable();
        lines.join("\n").replace("  ./", "  ")
    };
    assert_eq!(
        same(&guest.ok(&command)),
        same(&expected),
        "the guest reads other bytes"
    );

    // The root is in use as a root is: files are added, replaced and removed, on top of compressed clusters.
    guest.ok("
        mkdir /srv
        for n in 1 2 3 4 5 6; do dd if=/dev/urandom of=/srv/new$n bs=4k count=$((n * 50)) 2> /dev/null & done
        wait
        dd if=/dev/urandom of=/boot/vmlinux bs=1000 seek=5000 count=700 conv=notrunc 2> /dev/null
        rm -r /lib/modules/*/kernel/drivers/net
        sync");
    let whole = "cd / && find . -xdev -type f | LC_ALL=C sort | xargs sha256sum";
    let changed = guest.ok(whole);
    guest.reset();
    assert_eq!(guest.ok(whole), changed, "after a hard reset");
    guest.ok("sync; mount -o remount,ro /");
    guest.finish();
    server.stop();

    check_image(&overlay, "qcow2");
    assert!(
        untouched == fs::read(&base).expect("the base image"),
        "the base image changed"
    );
    let seen = workplace.as_raw(&overlay, "qcow2");
    let files = workplace.file("files");
    FileSystem::Ext4.read_out(&seen, &changed, &files);
    assert_eq!(
        manifest(&files),
        changed,
        "the host reads other bytes than the guest wrote"
    );
}

#[test]
fn compressed_with_zlib() {
    boots_from("zlib");
}

#[test]
fn compressed_with_zstd() {
    boots_from("zstd");
}
