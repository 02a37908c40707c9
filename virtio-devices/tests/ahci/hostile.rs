//! Drivers that break the rules.

use virtio_devices::{
    ahci::{
        driver::{Issue, command, queued},
        regs::{cmd, is, px},
    },
    ata::{TaskFile, opcode},
};

use crate::common::{BASE, DATA, MEMORY, Machine, Setup};

/// The port reports `bit`, does nothing more, and works again after a restart.
fn stops(machine: &mut Machine, bit: u32) {
    assert_ne!(
        machine.driver.get(px::IS) & bit,
        0,
        "{:#x}",
        machine.driver.get(px::IS)
    );
    machine.recover();
    machine.driver.prepare(0, &Issue::default());
    machine.read(command(opcode::READ_DMA_EXT, 0, 8), 4096).ok();
}

#[test]
fn lists_and_tables_outside_memory() {
    let mut machine = Machine::new(Setup::default());
    for list in [MEMORY as u64, !0x3ff] {
        machine.driver.set(px::CLB, list as u32);
        machine.driver.set(px::CLBU, (list >> 32) as u32);
        machine.driver.set(px::CI, 1);
        machine.work();
        machine.driver.set(px::CLB, BASE as u32);
        machine.driver.set(px::CLBU, 0);
        stops(&mut machine, is::HBFS);
    }
    for table in [MEMORY as u64, !0x7f] {
        machine.driver.prepare(0, &Issue::default());
        machine.driver.put(BASE + 8, &table.to_le_bytes());
        machine.driver.issue();
        machine.work();
        stops(&mut machine, is::HBFS);
    }
}

#[test]
fn received_fises_outside_memory() {
    let mut machine = Machine::new(Setup::default());
    machine.driver.set(px::FBU, 0xffff_ffff);
    machine.driver.prepare(
        0,
        &Issue {
            task: command(opcode::FLUSH_CACHE, 0, 0),
            ..Issue::default()
        },
    );
    machine.driver.issue();
    machine.work();
    assert_ne!(machine.driver.get(px::IS) & is::HBFS, 0);
    machine.driver.set(px::FBU, 0);
    stops(&mut machine, is::HBFS);
}

#[test]
fn no_command_fis() {
    let mut machine = Machine::new(Setup::default());
    for (length, kind) in [
        (0u8, 0x27u8),
        (1, 0x27),
        (4, 0x27),
        (17, 0x27),
        (31, 0x27),
        (5, 0x34),
        (5, 0),
    ] {
        machine.driver.prepare(0, &Issue::default());
        machine.driver.put(BASE, &[length]);
        machine
            .driver
            .put(machine.driver.layout().table(0), &[kind]);
        machine.driver.issue();
        machine.work();
        stops(&mut machine, is::IFS);
    }
}

#[test]
fn descriptors_outside_memory_or_too_few() {
    let mut machine = Machine::new(Setup::default());
    let end = MEMORY as u64;
    for (address, len) in [
        (end, 4096),
        (end - 2048, 4096),
        (u64::MAX - 1, 4096),
        (1 << 40, 4096),
    ] {
        for task in [
            command(opcode::READ_DMA_EXT, 0, 8),
            command(opcode::WRITE_SECTORS_EXT, 0, 8),
            queued(0, false, 0, 8),
            queued(0, true, 0, 8),
        ] {
            let before = machine.disk.log().len();
            machine.run(&Issue {
                task,
                data: &[(address, len)],
                ..Issue::default()
            });
            assert_eq!(machine.disk.log().len(), before, "nothing was moved");
            stops(&mut machine, is::HBFS);
        }
        machine.run(&Issue {
            task: command(opcode::IDENTIFY_DEVICE, 0, 0),
            data: &[(address, len)],
            ..Issue::default()
        });
        if address != end - 2048 {
            stops(&mut machine, is::HBFS);
        }
    }
    for data in [&[][..], &[(DATA, 4094)], &[(DATA, 1), (DATA, 1)]] {
        for task in [
            command(opcode::READ_DMA_EXT, 0, 8),
            command(opcode::WRITE_DMA_EXT, 0, 8),
        ] {
            let end = machine.run(&Issue {
                task,
                data,
                ..Issue::default()
            });
            assert_ne!(end.is & is::OFS, 0);
            stops(&mut machine, is::TFES);
        }
        let end = machine.run(&Issue {
            task: queued(0, true, 0, 8),
            data,
            ..Issue::default()
        });
        assert_ne!(end.is & is::OFS, 0);
        machine.recover();
        machine
            .read(command(opcode::READ_LOG_EXT, 0x10, 1), 512)
            .ok();
    }
}

#[test]
fn odd_and_overlapping_descriptors() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.write(0, &crate::common::pattern(4096, 1));
    let data = [(DATA + 1, 1), (DATA + 2, 510), (DATA + 512, 3585)];
    machine
        .run(&Issue {
            task: command(opcode::READ_DMA_EXT, 0, 8),
            data: &data,
            ..Issue::default()
        })
        .ok();
    let got = machine.driver.take(DATA + 1, 511);
    assert_eq!(got, machine.disk.contents()[..511]);
    // All in one place, and the command list itself.
    let data = [(DATA, 512); 8];
    machine
        .run(&Issue {
            task: command(opcode::READ_DMA_EXT, 0, 8),
            data: &data,
            ..Issue::default()
        })
        .ok();
    machine.run(&Issue {
        task: command(opcode::READ_DMA_EXT, 0, 8),
        data: &[(BASE, 4096)],
        ..Issue::default()
    });
    machine.recover();
    machine.read(command(opcode::READ_DMA_EXT, 0, 8), 4096).ok();
}

#[test]
fn a_table_changed_after_it_was_issued() {
    let mut machine = Machine::new(Setup::default());
    machine.disk.hold(true);
    let task = command(opcode::READ_DMA_EXT, 0, 8);
    machine.read(task, 4096);
    let layout = machine.driver.layout();
    machine.driver.put(layout.table(0), &[0xff; 0x90]);
    machine.driver.put(BASE, &[0xff; 4]);
    machine.disk.hold(false);
    machine.disk.release_all();
    machine.work();
    machine.outcome(0).ok();
}

#[test]
fn resets_in_flight() {
    for how in 0..4 {
        let mut machine = Machine::new(Setup::default());
        machine.disk.hold(true);
        for tag in 0..32u8 {
            machine.driver.prepare(
                u32::from(tag),
                &Issue {
                    task: queued(tag, tag % 2 == 0, u64::from(tag), 1),
                    data: &[(DATA, 512)],
                    ..Issue::default()
                },
            );
        }
        machine.driver.issue();
        machine.work();
        match how {
            0 => machine.driver.set_global(4, 1),
            1 => machine.driver.set(px::SCTL, 1),
            2 => machine.driver.stop(),
            _ => machine.hba.reset(),
        }
        machine.driver.set(px::IS, u32::MAX);
        // New commands wait for the old ones.
        machine.driver.set(px::CMD, cmd::ST | cmd::FRE);
        machine.driver.set(px::SACT, 1);
        machine.driver.set(px::CI, 1);
        machine.work();
        assert_eq!(machine.disk.held(), 32);
        machine.disk.hold(false);
        machine.disk.release_all();
        machine.work();
        assert_eq!(machine.worker.in_flight(), 0);
        machine.driver.set(px::SCTL, 1);
        machine.driver.set(px::SCTL, 0);
        machine.work();
        machine.driver.set(px::CMD, 0);
        machine.start();
        machine.read(command(opcode::READ_DMA_EXT, 0, 8), 4096).ok();
    }
}

/// Every command code with every kind of argument ends somehow, and the port can be used again.
#[test]
fn every_command() {
    let mut machine = Machine::new(Setup::default());
    for code in 0..=0xffu8 {
        for argument in [0u16, 1, 0x4f, 0xd5, 0xffff] {
            for lba in [0, 0xc2_4f80, 0xffff_ffff_ffff] {
                for device in [0x40, 0xff] {
                    let task = TaskFile {
                        command: code,
                        features: argument,
                        count: argument,
                        lba,
                        device,
                        auxiliary: u32::from(argument),
                    };
                    let end = machine.run(&Issue {
                        task,
                        packet: Some([code; 16]),
                        data: &[(DATA, 1 << 16), (DATA + (1 << 16), 1 << 16)],
                        write: code & 1 != 0,
                    });
                    assert_eq!(machine.worker.in_flight(), 0);
                    assert_eq!(end.status & 0x88, 0, "{task:x?}: {end:?}");
                    if end.status & 1 != 0 {
                        machine.recover();
                    }
                    // It may sleep now, or refuse queued commands.
                    if matches!(code, opcode::SLEEP | opcode::SLEEP_OLD) {
                        machine.driver.set(px::SCTL, 1);
                        machine.driver.set(px::SCTL, 0);
                        machine.recover();
                    }
                }
            }
        }
    }
    machine.driver.set(px::SCTL, 1);
    machine.driver.set(px::SCTL, 0);
    machine.recover();
    machine
        .read(command(opcode::READ_LOG_EXT, 0x10, 1), 512)
        .ok();
    machine.read(queued(0, false, 0, 8), 4096).ok();
}

#[test]
fn registers_of_any_width_and_place() {
    let machine = Machine::cold(Setup::default());
    let mut wide = [0; 8];
    machine.hba.read(0, &mut wide);
    assert_eq!(wide[7], 0x80, "GHC.AE");
    let mut byte = [0; 1];
    machine.hba.read(7, &mut byte);
    assert_eq!(byte, [0x80]);
    // One byte of PxIE; the others stay.
    machine.hba.write(0x100 + px::IE, &u32::MAX.to_le_bytes());
    machine.hba.write(0x100 + px::IE + 3, &[0]);
    assert_eq!(machine.driver.get(px::IE), 0x00c0_00ff);
    machine.hba.write(0x100 + px::CLB, &[0xff; 8]);
    assert_eq!(machine.driver.get(px::CLB), 0xffff_fc00);
    for offset in [0u64, 0xfff, 0x1000, u64::MAX - 3, u64::MAX] {
        let mut data = [0xaa; 16];
        machine.hba.read(offset, &mut data);
        machine.hba.write(offset, &[0; 0]);
    }
    machine.hba.write(u64::MAX - 8, &[0xff; 4]);
}
