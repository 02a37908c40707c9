//! A turn of QEMU.

use crate::round::Round;

impl Round {
    pub(crate) fn qemu_turn(&mut self) {
        let mut commands = Vec::new();
        for _ in 0..4 + self.rng.below(8) {
            let (start, len) = self.range(512);
            let value = self.rng.below(255) + 1;
            let model = &mut self.model;
            match self.rng.below(8) {
                0 => {
                    model.at(start, len).fill(0);
                    commands.push(format!("write -z {start} {len}"));
                }
                1 => {
                    model.at(start, len).fill(0);
                    commands.push(format!("write -z -u {start} {len}"));
                }
                2 if !model.keeps_discarded => {
                    model.discard(start, len, model.cluster);
                    commands.push(format!("discard {start} {len}"));
                }
                4 => commands.push("flush".into()),
                _ => {
                    model.at(start, len).fill(value as u8);
                    commands.push(format!("write -P {value} {start} {len}"));
                }
            }
        }
        let output = self.image.qemu_io(&commands);
        let good = !output.contains("failed") && !output.contains("Could not");
        assert!(good, "{}: {commands:?}: {output}", self.what());
        for _ in 0..self.rng.below(3) {
            self.qemu_compresses();
        }
    }

    /// QEMU writes a compressed cluster, unless there is a cluster already: then it refuses.
    fn qemu_compresses(&mut self) {
        if !self.can_compress() {
            return;
        }
        let (start, len) = self.clusters();
        let len = len.min(self.model.cluster);
        let value = self.rng.below(255) + 1;
        let command = format!("write -c -P {value} {start} {len}");
        let output = self.image.qemu_io(std::slice::from_ref(&command));
        if output.contains("Input/output error") {
            return;
        }
        assert!(
            output.contains("wrote"),
            "{}: {command}: {output}",
            self.what()
        );
        self.model.compressed.insert(start / self.model.cluster);
        self.model.at(start, len).fill(value as u8);
    }
}
