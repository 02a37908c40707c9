//! The table of internal snapshots, as `info` and `snapshot -l` print it.

use block::extras::SnapshotInfo;
use chrono::{DateTime, Local, Utc};

use crate::{say, util::size};

/// Prints the list; nothing when there are no snapshots.
pub(crate) fn print(snapshots: &[SnapshotInfo]) {
    if snapshots.is_empty() {
        return;
    }
    say!("Snapshot list:");
    say!("ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT");
    for snapshot in snapshots {
        say!("{}", line(snapshot));
    }
}

fn line(snapshot: &SnapshotInfo) -> String {
    let date = DateTime::<Utc>::from_timestamp(i64::from(snapshot.date_sec), 0)
        .map(|date| {
            date.with_timezone(&Local)
                .format("%Y-%m-%d %H:%M:%S")
                .to_string()
        })
        .unwrap_or_default();
    let seconds = snapshot.vm_clock_nsec / 1_000_000_000;
    let clock = format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        snapshot.vm_clock_nsec / 1_000_000 % 1000
    );
    format!(
        "{:<7} {:<16} {:>8} {date:>19} {clock:>15} {:>10}",
        snapshot.id,
        snapshot.name,
        size::human(snapshot.vm_state_size),
        snapshot
            .icount
            .map(|count| count.to_string())
            .unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_those_of_qemu_img() {
        let text = line(&SnapshotInfo {
            id: "1".into(),
            name: "foo".into(),
            vm_clock_nsec: 3_723_004_000_000,
            date_sec: 1_795_229_618,
            icount: Some(0),
            ..SnapshotInfo::default()
        });
        assert_eq!(&text[..33], "1       foo                   0 B");
        assert_eq!(&text[53..], "  0001:02:03.004          0");
    }
}
