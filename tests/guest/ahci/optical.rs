//! The optical drive: a medium is mounted, ejected by the guest, and changed by the host.

use crate::lab::Workplace;
use crate::lab::function::{FunctionServer, ctl};
use crate::shared::SharedGuest;

use super::{Adapter, iso::write_iso};

/// Bytes that no two media have in common.
fn content(seed: u8) -> Vec<u8> {
    (0..300_000_u32)
        .map(|at| (at.wrapping_mul(31) >> 3) as u8 ^ seed)
        .collect()
}

#[test]
fn ahci_media_are_mounted_ejected_and_changed() {
    let workplace = Workplace::new();
    let media = [1, 2].map(|seed| {
        let path = workplace.file(&format!("{seed}.iso"));
        write_iso(&path, "MEDIUM", &content(seed), None);
        path
    });
    let control = workplace.socket("control");
    let arguments = [
        "--cdrom",
        media[0].to_str().expect("plain text"),
        "--control",
        control.to_str().expect("plain text"),
    ];
    let mut server = FunctionServer::start(&workplace, "ahci", "ahci", &arguments);
    let mut guest = SharedGuest::get(1);
    let adapter = Adapter::plug(&mut guest, server.socket(0));
    let drive = adapter.drive(&mut guest, 0);
    let sum_of = |guest: &mut SharedGuest| {
        guest.wait_for(&format!(
            "mount -t iso9660 -o ro {drive} /mnt || exit 1
            sha256sum < /mnt/data; code=$?
            umount /mnt; exit $code"
        ))
    };
    let first = sum_of(&mut guest);
    assert_eq!(sum_of(&mut guest), first);

    // A mounted medium cannot be taken away; then the guest ejects it, and the host sees the tray.
    guest.ok(&format!("mount -t iso9660 -o ro {drive} /mnt"));
    let status = ctl(&control, &["status"]);
    assert_eq!(status["trays"][0]["locked"], true, "{status}");
    guest.ok(&format!("umount /mnt; sg_start --eject {drive}"));
    let status = ctl(&control, &["status"]);
    assert_eq!(status["trays"][0]["open"], true, "{status}");

    // Another medium; and the first one again, without a word of the guest.
    let second = media[1].to_str().expect("plain text");
    ctl(&control, &["insert", "port=0", &format!("image={second}")]);
    let other = sum_of(&mut guest);
    assert_ne!(other, first);
    let again = media[0].to_str().expect("plain text");
    ctl(&control, &["insert", "port=0", &format!("image={again}")]);
    assert_eq!(sum_of(&mut guest), first);
    adapter.remove(&mut guest);
    guest.done();
    server.stop();
}
