//! A real client without a guest: QEMU's own vhost-user-blk client, driven through qemu-io and qemu-img, against
//! `platter serve vhost-user-blk`. What one side wrote, the other reads, through the socket and from the file.
//!
//! Needs the lab of `tests/lab/setup.sh`.

mod lab;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::{Server, Workplace, check_image, run, run_any, tool};

/// The name qemu-img and qemu-io have for a served disk.
fn remote(server: &Server) -> String {
    format!(
        "driver=virtio-blk-vhost-user,cache.direct=on,path={}",
        server.socket().display()
    )
}

/// Runs qemu-io commands on a served disk; any error or wrong byte ends the test.
#[track_caller]
fn remote_io(server: &Server, commands: &[&str]) -> String {
    run(&mut io_command(&remote(server), commands))
}

fn io_command(image: &str, commands: &[&str]) -> Command {
    let mut io = tool("qemu-io");
    for command in commands {
        io.args(["-c", command]);
    }
    io.args(["--image-opts", image]);
    io
}

/// Runs qemu-io commands on an image file that nobody serves.
#[track_caller]
fn local_io(image: &Path, format: &str, commands: &[&str]) {
    let name = format!(
        "driver={format},file.driver=file,file.filename={}",
        image.display()
    );
    run(&mut io_command(&name, commands));
}

/// A raw image of data that is neither uniform nor periodic, of `size` bytes, with holes.
fn sample(workplace: &Workplace, size: u64) -> PathBuf {
    let path = workplace.file("sample.raw");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0_u8; usize::try_from(size).expect("a small image")];
    for (index, page) in bytes.chunks_mut(65536).enumerate() {
        if index % 5 == 3 {
            continue;
        }
        for word in page.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    fs::write(&path, bytes).expect("the sample");
    path
}

/// Every kind of request, checked through the same connection, through the next one, and in the file afterwards.
fn requests(format: &str) {
    let workplace = Workplace::new();
    let image = workplace.create("disk.img", format, "256M");
    let mut server = Server::start(&workplace, &image, format);
    remote_io(
        &server,
        &[
            "read -P 0 0 1M",
            "write -P 0xab 1M 64k",
            "write -P 0xcd 1028k 4k",
            "read -P 0xab 1M 4k",
            "read -P 0xcd 1028k 4k",
            "read -P 0xab 1032k 56k",
            // The first and the last sector, and a request that crosses every cluster size.
            "write -P 0x01 0 512",
            "write -P 0x02 268434944 512",
            "write -P 0x03 10485248 5M",
            "flush",
            "write -P 0x44 64M 4M",
            "write -z 65M 1M",
            "write -z -u 66M 1M",
            "read -P 0x44 64M 1M",
            "read -P 0 65M 2M",
            "read -P 0x44 67M 1M",
            "write -P 0x55 128M 4M",
            "discard 129M 1M",
            "read -P 0x55 128M 1M",
            "read -P 0x55 130M 2M",
            "write -f -P 0x66 200M 64k",
            "aio_write -P 0x71 210M 1M",
            "aio_write -P 0x72 212M 1M",
            "aio_write -P 0x73 214M 1M",
            "aio_flush",
            "read -P 0x71 210M 1M",
            "read -P 0x72 212M 1M",
            "read -P 0x73 214M 1M",
        ],
    );
    let checks = [
        "read -P 0x01 0 512",
        "read -P 0 512 512",
        "read -P 0x02 268434944 512",
        "read -P 0xab 1M 4k",
        "read -P 0xcd 1028k 4k",
        "read -P 0x03 10485248 5M",
        "read -P 0 65M 2M",
        "read -P 0x55 130M 2M",
        "read -P 0x66 200M 64k",
        "read -P 0x71 210M 1M",
    ];
    remote_io(&server, &checks);
    let length = remote_io(&server, &["length"]);
    assert_eq!(length.trim(), "256 MiB");
    server.stop();
    local_io(&image, format, &checks);
    check_image(&image, format);
}

#[test]
fn requests_on_raw() {
    requests("raw");
}

#[test]
fn requests_on_qcow2() {
    requests("qcow2");
}

/// Whole images through the socket, in both directions, compared by the client and against the file.
fn whole_images(format: &str) {
    const SIZE: u64 = 96 << 20;
    let workplace = Workplace::new();
    let source = sample(&workplace, SIZE);
    let image = workplace.create("disk.img", format, &SIZE.to_string());
    let mut server = Server::start(&workplace, &image, format);
    let remote = remote(&server);

    // In: the target exists, so it is not created; -n says so. Out: into a file of the host.
    run(tool("qemu-img")
        .args(["convert", "-n", "-f", "raw", "--target-image-opts"])
        .arg(&source)
        .arg(&remote));
    run(tool("qemu-img")
        .args(["compare", "--image-opts", &remote])
        .arg(format!(
            "driver=raw,file.driver=file,file.filename={}",
            source.display()
        )));
    let back = workplace.file("back.raw");
    run(tool("qemu-img")
        .args(["convert", "--image-opts", &remote, "-O", "raw"])
        .arg(&back));
    assert!(
        fs::read(&back).expect("the copy") == fs::read(&source).expect("the sample"),
        "the copy differs"
    );
    server.stop();

    let seen = workplace.as_raw(&image, format);
    assert!(
        fs::read(&seen).expect("the image") == fs::read(&source).expect("the sample"),
        "the file differs"
    );
    check_image(&image, format);
}

#[test]
fn whole_images_on_raw() {
    whole_images("raw");
}

#[test]
fn whole_images_on_qcow2() {
    whole_images("qcow2");
}

/// Reads that a backing chain, compressed clusters and zero clusters serve; writes that copy out of them.
#[test]
fn chain_on_qcow2() {
    const SIZE: u64 = 32 << 20;
    let workplace = Workplace::new();
    let source = sample(&workplace, SIZE);
    let base = workplace.file("base.qcow2");
    run(tool("qemu-img")
        .args(["convert", "-f", "raw", "-c", "-O", "qcow2"])
        .args([&source, &base]));
    let middle = workplace.create_overlay("middle.qcow2", &base, "qcow2");
    local_io(
        &middle,
        "qcow2",
        &["write -P 0x31 1M 3M", "write -z 5M 2M", "discard 8M 1M"],
    );
    let top = workplace.create_overlay("top.qcow2", &middle, "qcow2");
    let before = fs::read(workplace.as_raw(&top, "qcow2")).expect("the disk before");

    let mut server = Server::start(&workplace, &top, "qcow2");
    let back = workplace.file("back.raw");
    run(tool("qemu-img")
        .args(["convert", "--image-opts", &remote(&server), "-O", "raw"])
        .arg(&back));
    assert!(
        fs::read(&back).expect("the copy") == before,
        "the disk reads differently through the socket"
    );

    // Single sectors: everything around them has to be copied up.
    remote_io(
        &server,
        &[
            "write -P 0x91 1000k 512",
            "write -P 0x92 3000k 512",
            "write -P 0x93 6000k 512",
            "write -P 0x94 20000k 512",
        ],
    );
    server.stop();
    let mut expected = before;
    for (offset, byte) in [(1000, 0x91), (3000, 0x92), (6000, 0x93), (20000, 0x94)] {
        expected[offset << 10..][..512].fill(byte);
    }
    let after = fs::read(workplace.as_raw(&top, "qcow2")).expect("the disk after");
    assert!(
        after == expected,
        "a write changed more, or less, than its own sector"
    );
    for image in [&base, &middle, &top] {
        check_image(image, "qcow2");
    }
}

/// qemu-img's benchmark, many requests in flight, and a request beyond the end.
fn load(format: &str) {
    let workplace = Workplace::new();
    let image = workplace.create("disk.img", format, "128M");
    let mut server = Server::start(&workplace, &image, format);
    let remote = remote(&server);
    remote_io(&server, &["write -P 0x77 0 128M"]);
    for extra in [&["-w"][..], &["-w", "--flush-interval=64"], &[]] {
        let mut bench = tool("qemu-img");
        bench.args([
            "bench", "-c", "20000", "-d", "64", "-s", "4096", "-t", "none",
        ]);
        let text = run(bench.args(extra).args(["--image-opts", &remote]));
        assert!(text.contains("Run completed in"), "{text}");
    }
    // The benchmark writes zeroes over the first 20000 blocks.
    remote_io(
        &server,
        &["read -P 0 0 81920000", "read -P 0x77 81920000 52297728"],
    );

    // Beyond the end: refused, and the server goes on.
    let beyond = run_any(&mut io_command(&remote, &["write -P 1 127M 2M"]));
    assert!(!beyond.status.success(), "a write beyond the end succeeded");
    remote_io(&server, &["read -P 0x77 127M 1M"]);
    server.stop();
    check_image(&image, format);
}

#[test]
fn load_on_raw() {
    load("raw");
}

#[test]
fn load_on_qcow2() {
    load("qcow2");
}
