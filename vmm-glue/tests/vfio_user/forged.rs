//! States that are not what they say: refused, and the device is as good as new after a reset.

use virtio_devices::{
    ahci::{driver::command, regs::px},
    ata::opcode,
    testing::{MockDisk, MockDiskConfig},
};
use vmm_glue::vfio_user::NvmeFunctionConfig;

use crate::{
    ahci_driver::Ahci,
    client::Client,
    migration::{EINVAL, ERROR, Moving, RESUMING, RUNNING, STOP},
    nvme_driver::Nvme,
    server::{ahci, nvme, nvme_with},
};

/// What is made of a state by somebody who means no good: the bytes, and whether they are refused at once.
fn forgeries(good: &[u8]) -> Vec<(Vec<u8>, bool)> {
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.to_vec();
        bytes[at] = byte;
        bytes
    };
    let lengths = |config: u32, device: u32| {
        let mut bytes = good.to_vec();
        bytes[16..20].copy_from_slice(&config.to_le_bytes());
        bytes[20..24].copy_from_slice(&device.to_le_bytes());
        bytes
    };
    let mut list = Vec::new();
    // Truncated.
    for len in [0, 1, 23, 24, 100, 300, good.len() - 1] {
        list.push((good[..len].to_vec(), false));
    }
    // Another format, version, class; the PCI identifier of another device.
    list.extend([0, 8, 12, 14].map(|at| (changed(at, 0x77), true)));
    list.push((changed(24, 0x77), false));
    // Huge, or not what it is.
    list.push((lengths(u32::MAX, u32::MAX), true));
    list.push((lengths(256, 64 << 20), true));
    list.push((lengths(1 << 20, 0), true));
    list.push((lengths(256, 0), true));
    list.push(([good, b"more"].concat(), true));
    // A model that is none: nothing, nonsense, deeply nested, another version.
    let with = |model: &[u8]| {
        let mut bytes = good[..24 + 256].to_vec();
        bytes[20..24].copy_from_slice(&(model.len() as u32).to_le_bytes());
        bytes.extend_from_slice(model);
        (bytes, false)
    };
    list.push(with(b""));
    list.push(with(b"{}"));
    list.push(with(b"[1,2,3]"));
    list.push(with(&b"[".repeat(100_000)));
    let model = String::from_utf8(good[24 + 256..].to_vec()).unwrap();
    let version = model.find("\"version\":").unwrap() + 10;
    list.push(with(
        format!("{}9{}", &model[..version], &model[version + 1..]).as_bytes(),
    ));
    list
}

/// Every forgery is refused, and the device is as good as new after a reset. `works` starts it and uses it.
fn refuses(client: &mut Client, good: &[u8], mut works: impl FnMut(&mut Client)) {
    for (number, (bytes, at_once)) in forgeries(good).into_iter().enumerate() {
        works(client);
        client.go(RESUMING).unwrap();
        let written = client.write_state(&bytes);
        assert_eq!(
            written,
            if at_once { Err(EINVAL) } else { Ok(()) },
            "{number}"
        );
        assert_eq!(client.state(), RESUMING);
        assert_eq!(client.go(STOP), Err(EINVAL), "{number}");
        assert_eq!(client.state(), ERROR);
        client.call(13, &[], &[]).unwrap();
        assert_eq!(client.state(), RUNNING);
    }
    works(client);
}

fn use_nvme(client: &mut Client) {
    client.enable_again();
    client.create_queues();
    assert_eq!(client.transfer(0, 2), 0);
}

fn use_ahci(client: &mut Client) {
    client.start();
    client.issue(&command(opcode::READ_DMA_EXT, 0, 1), false);
    client.finish();
    client.set_port(px::CMD, 0);
}

#[test]
fn a_controller_refuses_what_is_not_its_state() {
    let server = nvme();
    let mut client = server.client();
    client.map();
    use_nvme(&mut client);
    let good = client.save();
    client.go(RUNNING).unwrap();
    refuses(&mut client, &good, use_nvme);
    // Queues that cannot be, and a state of a controller with other vectors.
    let model = String::from_utf8(good[280..].to_vec()).unwrap();
    for (from, to) in [
        ("\"size\":16", "\"size\":0"),
        ("\"size\":16", "\"size\":4294967295"),
        ("\"tail\":", "\"tail\":99"),
        ("\"vector\":1", "\"vector\":9"),
        ("\"lba_size\":512", "\"lba_size\":513"),
        ("\"nsid\":1", "\"nsid\":7"),
        (
            "\"event_requests\":[]",
            "\"event_requests\":[1,2,3,4,5,6,7,8,9]",
        ),
        (
            "\"waiting\":[]",
            "\"waiting\":[{\"opcode\":6,\"cid\":1,\"cdw10\":0}]",
        ),
    ] {
        assert!(model.contains(from), "{from}");
        let model = model.replacen(from, to, 1);
        let mut bytes = good[..280].to_vec();
        bytes[20..24].copy_from_slice(&(model.len() as u32).to_le_bytes());
        bytes.extend_from_slice(model.as_bytes());
        client.go(RESUMING).unwrap();
        client.write_state(&bytes).unwrap();
        assert_eq!(client.go(STOP), Err(EINVAL), "{to}");
        client.call(13, &[], &[]).unwrap();
    }
    use_nvme(&mut client);
    let disk = MockDisk::new(MockDiskConfig::default());
    let config = NvmeFunctionConfig {
        device: 0x10f5,
        ..NvmeFunctionConfig::default()
    };
    let other = nvme_with(disk.clone(), Box::new(disk), &config);
    let mut client = other.client();
    client.map();
    client.go(RESUMING).unwrap();
    client.write_state(&good).unwrap();
    assert_eq!(client.go(STOP), Err(EINVAL));
    client.call(13, &[], &[]).unwrap();
    use_nvme(&mut client);
}

#[test]
fn an_adapter_refuses_what_is_not_its_state() {
    let server = ahci();
    let mut client = server.client();
    client.map();
    use_ahci(&mut client);
    let good = client.save();
    client.go(RUNNING).unwrap();
    refuses(&mut client, &good, use_ahci);
    // Neither the state of a controller, nor that of an adapter with another drive.
    let controller = nvme();
    let mut other = controller.client();
    let state = other.save();
    client.go(RESUMING).unwrap();
    assert_eq!(client.write_state(&state), Err(EINVAL));
    client.call(13, &[], &[]).unwrap();
    server.function.hba().unplug(0).unwrap();
    client.go(RESUMING).unwrap();
    client.write_state(&good).unwrap();
    assert_eq!(client.go(STOP), Err(EINVAL));
}
