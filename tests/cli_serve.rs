//! `platter serve nvme` from outside: what it says, and a pool that outlives it, with the client of `vmm-glue`'s tests.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "tests; parts of the client are for others"
)]

#[path = "../vmm-glue/tests/vfio_user/ahci_driver.rs"]
mod ahci_driver;
#[path = "../vmm-glue/tests/vfio_user/client.rs"]
mod client;
mod lab;
#[path = "../vmm-glue/tests/vfio_user/nvme_driver.rs"]
mod nvme_driver;

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use ahci_driver::{Ahci, DATA, Issue};
use client::{BASE, Client};
use lab::{
    Workplace,
    function::{FunctionServer, ctl},
    platter, run, run_any,
};
use nvme_driver::Nvme;
use serde_json::Value;
use virtio_devices::{
    ahci::driver::command,
    ata::{TaskFile, opcode},
};

/// Where data of admin commands is.
const PAGE: u64 = 0xa000;

fn raw(workplace: &Workplace) -> String {
    let image = workplace.file("disk.raw");
    run(platter()
        .args(["create", "-q", "-f", "raw"])
        .arg(&image)
        .arg("1M"));
    format!("{},format=raw", image.display())
}

#[test]
fn a_server_that_polls_says_so_and_no_other_does() {
    let workplace = Workplace::new();
    let namespace = raw(&workplace);
    let arguments = ["--namespace", &namespace, "--poll"];
    let mut polling = FunctionServer::start_many(&workplace, "nvme", "polling", 2, &arguments);
    let mut sleeping = FunctionServer::start(
        &workplace,
        "nvme",
        "sleeping",
        &["--pool", &pool(&workplace).1],
    );
    // GET_REGION_INFO: the flag "can be mapped".
    let can_be_mapped = |socket: &Path| {
        let mut client = Client::connect(socket);
        let info = client.words(5, &[32, 0, 0, 0, 0, 0, 0, 0], &[]).unwrap();
        info[4] & 4 != 0
    };
    assert!(can_be_mapped(polling.socket(0)) && can_be_mapped(polling.socket(1)));
    assert!(!can_be_mapped(sleeping.socket(0)));
    polling.stop();
    sleeping.stop();
    let said = polling.messages();
    for socket in [0, 1] {
        let notice = format!(
            "platter: {}: --poll: looks at the doorbells all the time, and never sleeps",
            polling.socket(socket).display()
        );
        assert_eq!(said.matches(&notice).count(), 1, "{said}");
    }
    assert_eq!(sleeping.messages(), "");
}

/// The folder of a pool, and the argument for it.
fn pool(workplace: &Workplace) -> (PathBuf, String) {
    let folder = workplace.file("pool");
    fs::create_dir(&folder).unwrap();
    let argument = format!("{},capacity=4M", folder.display());
    (folder, argument)
}

fn files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = names
        .map(|it| it.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

/// Executes admin command `index` with its data in the page for it.
fn admin(client: &mut Client, index: u64, opcode: u32, nsid: u32, cdw10: u32) -> u16 {
    let at = BASE + PAGE;
    let entry = [
        (0, opcode | 9 << 16),
        (1, nsid),
        (6, at as u32),
        (7, (at >> 32) as u32),
        (10, cdw10),
    ];
    client.command(0, index, &entry)
}

/// Creates and attaches namespace 1, of a megabyte.
fn create(client: &mut Client, index: u64) {
    let mut page = [0; 4096];
    page[..8].copy_from_slice(&2048_u64.to_le_bytes());
    page[8..16].copy_from_slice(&2048_u64.to_le_bytes());
    client.memory.write_all_at(&page, PAGE).unwrap();
    assert_eq!(admin(client, index, 0x0d, 0, 0), 0);
    let mut nsid = [0; 4];
    let at = 0x1000 + index * 16;
    client.memory.read_exact_at(&mut nsid, at).unwrap();
    assert_eq!(nsid, [1, 0, 0, 0]);
    page.fill(0);
    page[0] = 1;
    client.memory.write_all_at(&page, PAGE).unwrap();
    assert_eq!(admin(client, index + 1, 0x15, 1, 0), 0);
}

/// UNVMCAP.
fn free(client: &mut Client, index: u64) -> u64 {
    assert_eq!(client.identify(index), 0);
    let mut bytes = [0; 8];
    client.memory.read_exact_at(&mut bytes, PAGE + 296).unwrap();
    u64::from_le_bytes(bytes)
}

fn connect(server: &FunctionServer) -> Client {
    let mut client = Client::connect(server.socket(0));
    client.map();
    client.enable();
    client.create_queues();
    client
}

/// What `platter ctl` says to a command that is refused.
fn refused(control: &Path, words: &[&str]) -> String {
    let output = run_any(platter().arg("ctl").arg(control).args(words));
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_pool_outlives_its_server() {
    let workplace = Workplace::new();
    let (folder, argument) = pool(&workplace);
    let control = workplace.socket("ctl");
    let socket = control.to_str().unwrap();
    let arguments = ["--pool", &argument, "--control", socket];
    let mut server = FunctionServer::start(&workplace, "nvme", "nvme", &arguments);
    let namespaces = || ctl(&control, &["status"])["namespaces"].clone();
    assert_eq!(namespaces(), Value::Array(Vec::new()));

    let mut client = connect(&server);
    assert_eq!(free(&mut client, 2), 4 << 20);
    create(&mut client, 3);
    client.memory.write_all_at(&[7; 512], 0x8000).unwrap();
    assert_eq!(client.transfer(0, 1), 0);
    let listed = namespaces();
    let image = folder.join("namespace-1.raw");
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!(listed[0]["nsid"], 1, "{listed}");
    assert_eq!(listed[0]["image"], image.to_str().unwrap(), "{listed}");
    assert_eq!(listed[0]["size"], 1 << 20, "{listed}");
    assert_eq!(listed[0]["pool"], true, "{listed}");
    drop(client);
    server.stop();

    server.start_again();
    assert_eq!(namespaces(), listed);
    let mut client = connect(&server);
    assert_eq!(free(&mut client, 2), 3 << 20);
    assert_eq!(client.transfer(0, 2), 0);
    let mut data = [0; 512];
    client.memory.read_exact_at(&mut data, 0x8000).unwrap();
    assert_eq!(data, [7; 512]);

    // It cannot be removed and left there: it would be back.
    let why = refused(&control, &["remove-namespace", "nsid=1"]);
    for part in ["namespace 1 ", image.to_str().unwrap(), "--delete"] {
        assert!(why.contains(part), "{why}");
    }
    assert_eq!(namespaces(), listed);
    assert_eq!(client.transfer(1, 2), 0);
    for words in [
        &["status", "--delete"][..],
        &["remove-namespace", "nsid=1", "delete=perhaps"],
    ] {
        let why = refused(&control, words);
        assert!(why.contains("'delete'"), "{why}");
    }
    assert_eq!(files(&folder), ["namespace-1.nvme", "namespace-1.raw"]);

    ctl(&control, &["remove-namespace", "nsid=1", "--delete"]);
    assert_eq!(namespaces(), Value::Array(Vec::new()));
    assert!(files(&folder).is_empty());
    assert_eq!(free(&mut client, 3), 4 << 20);
    assert_ne!(client.transfer(2, 2), 0);
    // Its place is free for another one.
    create(&mut client, 4);
    assert_eq!(client.transfer(3, 2), 0);
    client.memory.read_exact_at(&mut data, 0x8000).unwrap();
    assert_eq!(data, [0; 512]);
    drop(client);
    ctl(&control, &["remove-namespace", "nsid=1", "delete=true"]);
    server.stop();
    server.start_again();
    assert_eq!(namespaces(), Value::Array(Vec::new()));
    server.stop();
}

#[test]
fn an_image_of_the_command_line_is_removed_and_never_deleted() {
    let workplace = Workplace::new();
    let namespace = raw(&workplace);
    let control = workplace.socket("ctl");
    let (_, pool) = pool(&workplace);
    let arguments = [
        "--namespace",
        &namespace,
        "--pool",
        &pool,
        "--control",
        control.to_str().unwrap(),
    ];
    let mut server = FunctionServer::start(&workplace, "nvme", "nvme", &arguments);
    let listed = ctl(&control, &["status"]);
    assert_eq!(listed["namespaces"][0]["pool"], false, "{listed}");
    let why = refused(&control, &["remove-namespace", "nsid=1", "--delete"]);
    for part in ["namespace 1 ", "disk.raw", "can only be removed"] {
        assert!(why.contains(part), "{why}");
    }
    ctl(&control, &["remove-namespace", "nsid=1"]);
    assert!(workplace.file("disk.raw").exists());
    server.stop();
}

/// A qcow2 image of three megabytes; a comma in its name is doubled where it is an option.
fn qcow2(workplace: &Workplace) -> String {
    let image = workplace.file("disk,1.qcow2");
    run(platter()
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("3M"));
    let path = image.display().to_string().replace(',', ",,");
    format!("driver=qcow2,file.filename={path}")
}

#[test]
fn a_disk_named_by_options_is_served() {
    let workplace = Workplace::new();
    let options = qcow2(&workplace);
    for poll_max in ["0", "32", "1000000"] {
        let name = format!("poll-{poll_max}-");
        let control = workplace.socket(&format!("{name}ctl"));
        let arguments = [
            "--control",
            control.to_str().unwrap(),
            "--poll-max",
            poll_max,
            "--image-opts",
            &options,
        ];
        let mut server = FunctionServer::start(&workplace, "vhost-user-blk", &name, &arguments);
        // What the format says, not how long the file is.
        assert_eq!(ctl(&control, &["status"])["size"], 3 << 20);
        server.stop();
        assert_eq!(server.messages(), "");
    }
}

#[test]
fn what_a_vhost_user_server_cannot_do_is_said_with_option_and_value() {
    let workplace = Workplace::new();
    let options = qcow2(&workplace);
    let socket = workplace.socket("none.sock");
    let with = |more: &str| format!("{options},{more}");
    let cases: [(&[&str], &[&str]); 10] = [
        (
            &["--poll-max", "1000001", "disk.raw"],
            &["--poll-max <US>", "1000001", "0..=1000000"],
        ),
        (&["--poll-max=-1", "disk.raw"], &["--poll-max <US>", "-1"]),
        (
            &["--poll-max", "32us", "disk.raw"],
            &["--poll-max <US>", "32us"],
        ),
        (&["--poll-max"], &["--poll-max <US>"]),
        (
            &["--image-opts", "driver=vmdk9,file.filename=disk.raw"],
            &["driver=vmdk9", "Unknown driver 'vmdk9'"],
        ),
        (
            &["--image-opts", "driver=qcow2"],
            &["'driver=qcow2'", "\"file\""],
        ),
        (
            &["--image-opts", "driver=raw,file.filename=/nowhere/disk.raw"],
            &["/nowhere/disk.raw", "No such file or directory"],
        ),
        (
            &["--image-opts", "-f", "qcow2", &options],
            &["--image-opts and --format are mutually exclusive"],
        ),
        (&["--image-opts", &with("colour=red")], &["colour"]),
        (
            &["--image-opts", &with("lazy-refcounts=perhaps")],
            &["lazy-refcounts", "perhaps"],
        ),
    ];
    for (arguments, expected) in cases {
        let mut command = platter();
        command.args(["serve", "vhost-user-blk", "--socket"]);
        let output = run_any(command.arg(&socket).args(arguments));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{arguments:?}: {said}");
        for text in expected {
            assert!(said.contains(text), "{arguments:?}: {said}");
        }
        assert!(!socket.exists(), "{arguments:?}: it listens");
    }
}

/// SANITIZE DEVICE without data; gives the Count field of its end.
fn sanitize(client: &mut Client, features: u16, lba: u64) -> u16 {
    let task = TaskFile {
        features,
        ..command(opcode::SANITIZE_DEVICE, lba, 0)
    };
    client.issue_on(0, &task, Issue::default());
    client.finish();
    // In the Register FIS.
    let mut count = [0; 2];
    client.memory.read_exact_at(&mut count, 0x44c).unwrap();
    u16::from_le_bytes(count)
}

#[test]
fn a_disk_with_a_sidecar_can_be_erased() {
    let workplace = Workplace::new();
    let disk = raw(&workplace);
    let image = workplace.file("disk.raw");
    fs::write(&image, [7; 1 << 20]).unwrap();
    let disk = format!("{disk},sidecar={}", workplace.file("disk.ata").display());
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &["--disk", &disk]);
    let mut client = Client::connect(server.socket(0));
    client.map();
    client.start();
    client.issue(&command(opcode::IDENTIFY_DEVICE, 0, 0), false);
    client.finish();
    let mut id = [0; 512];
    client.memory.read_exact_at(&mut id, DATA).unwrap();
    let word = |at: usize| u16::from_le_bytes([id[at * 2], id[at * 2 + 1]]);
    assert_eq!((word(59) & 0xfc00, word(82) & 2, word(128)), (0xdc00, 2, 1));
    sanitize(&mut client, 0x12, 0x426b_4572);
    client.until("the end of sanitize", |it| sanitize(it, 0, 0) == 0x8000);
    drop(client);
    server.stop();
    assert_eq!(fs::read(&image).unwrap(), [0; 1 << 20]);
    let kept = fs::read_to_string(workplace.file("disk.ata")).unwrap();
    assert!(kept.contains("Succeeded"), "{kept}");
}

#[test]
fn a_sidecar_is_refused_where_an_erase_would_leave_copies() {
    let workplace = Workplace::new();
    let image = workplace.file("disk.qcow2");
    run(platter()
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("1M"));
    let read_only = format!("{},readonly=on", raw(&workplace));
    for disk in [&format!("{},format=qcow2", image.display()), &read_only] {
        let sidecar = workplace.file("disk.ata");
        let output = run_any(
            platter()
                .args(["serve", "ahci", "--socket"])
                .arg(workplace.socket("ahci.sock"))
                .arg("--disk")
                .arg(format!("{disk},sidecar={}", sidecar.display())),
        );
        assert!(!output.status.success());
        let errors = String::from_utf8(output.stderr).unwrap();
        let expected = format!(
            "sidecar={}: expected a writable raw or LUKS image",
            sidecar.display()
        );
        assert!(errors.contains(&expected), "{errors}");
        assert!(!sidecar.exists());
    }
}

#[test]
fn a_namespace_that_is_really_overwritten_offers_sanitize() {
    let workplace = Workplace::new();
    let namespace = raw(&workplace);
    let with = format!(
        "{namespace},sidecar={}",
        workplace.file("disk.nvme").display()
    );
    for (name, namespace, expected) in [("with", &with, 6), ("without", &namespace, 0)] {
        let mut server =
            FunctionServer::start(&workplace, "nvme", name, &["--namespace", namespace]);
        let mut client = connect(&server);
        assert_eq!(client.identify(2), 0);
        let mut sanicap = [0; 4];
        let at = PAGE + 328;
        client.memory.read_exact_at(&mut sanicap, at).unwrap();
        assert_eq!(u32::from_le_bytes(sanicap) & 7, expected, "{name}");
        drop(client);
        server.stop();
    }
}
