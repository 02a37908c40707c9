//! Extended L2 entries where a change touches a part of a cluster.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use std::path::Path;

use block::{Disk, DiskExtras, DiskFile, NewSnapshot, OpenOptions};
use qcow2_support::{assert_clean, qemu_create, qemu_io, temp_dir};

const CLUSTER: usize = 64 << 10;
const UNIT: usize = CLUSTER / 32;

fn contents(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// QEMU reads `value` in a range.
fn qemu_sees(path: &Path, value: u8, start: usize, len: usize) {
    qemu_io(path, &[&format!("read -P {value} {start} {len}")]);
}

#[test]
fn zeroes_in_a_part_of_a_shared_cluster_leave_the_rest() {
    for (may_unmap, keep_references) in [(false, false), (true, false), (true, true)] {
        let dir = temp_dir();
        let path = qemu_create(&dir, "a.qcow2", "extended_l2=on", "1M");
        let options = OpenOptions::new().discard_no_unref(keep_references);
        let disk = options.open_disk(&path).unwrap();
        disk.write_at(&[7; 3 * CLUSTER], 0).unwrap();
        let snapshot = NewSnapshot {
            name: "s".into(),
            ..NewSnapshot::default()
        };
        disk.create_snapshot(&snapshot).unwrap();
        // From inside a unit of the first cluster to inside one of the third.
        let (start, end) = (5 * UNIT + 100, 2 * CLUSTER + 9 * UNIT + 300);
        disk.write_zeroes(start as u64, (end - start) as u64, may_unmap)
            .unwrap();
        let mut model = vec![7; 3 * CLUSTER];
        model[start..end].fill(0);
        model.resize(1 << 20, 0);
        let what = format!("unmap {may_unmap}, keeps references {keep_references}");
        assert!(contents(&disk) == model, "{what}");
        disk.discard(0, UNIT as u64).unwrap();
        model[..UNIT].fill(0);
        assert!(contents(&disk) == model, "{what}, a discard");
        disk.close().unwrap();
        assert_clean(&path, &what);
        qemu_sees(&path, 7, UNIT, start - UNIT);
        qemu_sees(&path, 0, start, end - start);
        qemu_sees(&path, 7, end, 3 * CLUSTER - end);
        let options = OpenOptions::new().read_only(true).snapshot("s");
        let old = contents(&options.open_disk(&path).unwrap());
        assert!(old[..3 * CLUSTER].iter().all(|byte| *byte == 7), "{what}");
    }
}

#[test]
fn the_last_compressed_cluster_is_whole_where_the_disk_ends() {
    for options in ["extended_l2=on", "extended_l2=off"] {
        let dir = temp_dir();
        let path = qemu_create(&dir, "a.qcow2", options, "100k");
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        let len = (100 << 10) - CLUSTER;
        disk.write_compressed(&vec![3; len], CLUSTER as u64)
            .unwrap();
        disk.discard(CLUSTER as u64, len as u64).unwrap();
        assert!(contents(&disk).iter().all(|byte| *byte == 0), "{options}");
        // What lies behind the end shows nothing old.
        disk.resize(1 << 20).unwrap();
        assert!(contents(&disk).iter().all(|byte| *byte == 0), "{options}");
        disk.close().unwrap();
        assert_clean(&path, options);
        qemu_sees(&path, 0, 0, 1 << 20);
    }
}
