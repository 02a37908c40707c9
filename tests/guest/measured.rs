//! One guest with disks in pairs, and runs of fio on them.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::lab::Workplace;
use crate::lab::function::{FunctionServer, ctl};
use crate::machine::Guest;

/// How much is done.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Pairs of runs for each row.
    pub(crate) pairs: usize,
    /// Length of a run.
    pub(crate) seconds: u32,
    /// Accesses of the run that is counted.
    pub(crate) count: u32,
    /// Bytes of each image.
    pub(crate) size: u64,
    /// Only rows with this in their name.
    pub(crate) only: String,
}

/// What fio does, in blocks of 4 KiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// fio's word.
    how: &'static str,
    /// How many are in flight.
    depth: u32,
}

impl Work {
    /// Everything that is measured.
    pub(crate) const ALL: [Self; 4] = [
        Self::new("randread", 1),
        Self::new("randread", 32),
        Self::new("randwrite", 1),
        Self::new("randwrite", 32),
    ];

    const fn new(how: &'static str, depth: u32) -> Self {
        Self { how, depth }
    }
}

/// A disk, as the guest has it.
#[derive(Debug)]
struct Disk {
    /// Its block device.
    device: String,
    /// The PCI address of its function.
    pci: String,
    /// What is in QEMU's names of the function's register areas.
    registers: &'static str,
    /// Where its server listens for `platter ctl`, if it has one.
    control: Option<PathBuf>,
}

/// Platter's and QEMU's model of the same device.
#[derive(Debug)]
struct Pair {
    /// The device.
    name: &'static str,
    ours: Disk,
    qemus: Disk,
}

/// The guest with its disks.
#[derive(Debug)]
pub(crate) struct Lab {
    guest: Guest,
    servers: Vec<FunctionServer>,
    pairs: Vec<Pair>,
    /// Where QEMU writes down accesses to registers.
    trace: PathBuf,
    _workplace: Workplace,
}

/// What a run cost besides time, for each access.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Writes to registers.
    writes: f64,
    /// Reads of registers.
    reads: f64,
    /// Interrupts that the guest handled.
    interrupts: f64,
    /// Times the server found something to do, where it counts them.
    drains: Option<f64>,
}

impl fmt::Display for Cost {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            writes,
            reads,
            interrupts,
            ..
        } = self;
        write!(out, "{writes:.2} + {reads:.2} | {interrupts:.2}")
    }
}

/// A row of the table.
#[derive(Debug)]
pub(crate) struct Row {
    name: String,
    /// Accesses a second of each pair of runs: ours, and QEMU's.
    runs: Vec<(f64, f64)>,
    ours: Cost,
    qemus: Cost,
}

impl Row {
    /// The table's head.
    pub(crate) const HEAD: &str = "\
| 4 KiB | Platter, IOPS | QEMU, IOPS | ratio, median (min to max) | Platter: register writes + reads an access | \
interrupts | drains | QEMU: register writes + reads an access | interrupts |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |";
}

/// The middle one, the least and the largest.
fn spread(numbers: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    let at = |place: usize| numbers.get(place).copied().unwrap_or(f64::NAN);
    let last = numbers.len().saturating_sub(1);
    let middle = f64::midpoint(at(last / 2), at(last.div_ceil(2)));
    (middle, at(0), at(last))
}

impl fmt::Display for Row {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ours, ..) = spread(self.runs.iter().map(|run| run.0));
        let (qemus, ..) = spread(self.runs.iter().map(|run| run.1));
        let (ratio, least, most) = spread(self.runs.iter().map(|run| run.0 / run.1));
        let drains = self.ours.drains.unwrap_or(f64::NAN);
        write!(
            out,
            "| {} | {ours:.0} | {qemus:.0} | {ratio:.2} ({least:.2} to {most:.2}) | {} | {drains:.2} | {} |",
            self.name, self.ours, self.qemus
        )
    }
}

/// A device of QEMU's own on an image.
fn qemus_device(node: &str, image: &Path, devices: &[&str]) -> Vec<String> {
    let file = json!({"driver": "file", "filename": image, "aio": "io_uring"});
    let node = json!({"driver": "raw", "node-name": node, "file": file});
    let mut arguments = vec!["-blockdev".to_owned(), node.to_string()];
    for device in devices {
        arguments.extend(["-device".to_owned(), (*device).to_owned()]);
    }
    arguments
}

/// Finds a namespace by the serial number of its controller; prints the PCI address and the block device.
const FIND_NVME: &str = "
for controller in /sys/class/nvme/nvme*; do
    grep -q '^SERIAL *$' $controller/serial || continue
    for device in /dev/nvme*n1; do
        nvme id-ctrl $device | grep -q '^sn  *: SERIAL *$' || continue
        echo $(basename $(readlink -f $controller/device)) $device
        exit 0
    done
done
exit 1";

/// The same for an ATA disk.
const FIND_AHCI: &str = "
for device in /dev/sd?; do
    hdparm -I $device 2> /dev/null | grep -q 'Serial Number: *SERIAL *$' || continue
    echo $(readlink -f /sys/block/$(basename $device) | grep -o '0000:[0-9a-f:.]*' | tail -1) $device
    exit 0
done
exit 1";

/// What all runs of fio have in common: nothing that costs the guest's processor time and is not needed here.
const OPTIONS: &str = "--norandommap --randrepeat=0 --gtod_reduce=1";

impl Lab {
    /// Makes the images, starts the servers and boots the guest.
    pub(crate) fn start(plan: &Plan) -> Self {
        let workplace = Workplace::new();
        let images = ["nvme", "qemu-nvme", "ahci", "qemu-ahci"].map(|name| workplace.file(name));
        fill(&images[0], plan.size);
        for copy in &images[1..] {
            fs::copy(&images[0], copy).expect("a copy of the image");
        }
        let [nvme, qemus_nvme, ahci, qemus_ahci] = images;
        let controls = ["nvme", "ahci"].map(|name| workplace.socket(&format!("{name}.ctl")));
        let serve = |name: &str, disk: &[&str], control: &Path| {
            let control = control.to_str().expect("a plain path");
            let common = ["--engine", "io_uring", "--control", control];
            FunctionServer::start(&workplace, name, name, &[disk, &common].concat())
        };
        let namespace = format!("{},format=raw", nvme.display());
        let disk = format!("{},format=raw,serial=OUR-ahci", ahci.display());
        let servers = vec![
            serve(
                "nvme",
                &["--namespace", &namespace, "--serial", "OUR-nvme"],
                &controls[0],
            ),
            serve("ahci", &["--disk", &disk], &controls[1]),
        ];
        let trace = workplace.file("trace");
        let trace_arguments = ["-D", trace.to_str().expect("a plain path")];
        let mut guest = Guest::builder()
            .fio()
            .function(servers[0].socket(0))
            .function(servers[1].socket(0))
            .arguments(qemus_device(
                "nvme",
                &qemus_nvme,
                &["nvme,drive=nvme,serial=QEMU-nvme"],
            ))
            .arguments(qemus_device(
                "ahci",
                &qemus_ahci,
                &[
                    "ich9-ahci,id=hba",
                    "ide-hd,drive=ahci,bus=hba.0,serial=QEMU-ahci",
                ],
            ))
            .arguments(trace_arguments)
            .module("nvme")
            .module("ahci")
            .module("sd_mod")
            .boot();
        let [nvme_control, ahci_control] = controls;
        let pairs = vec![
            Pair {
                name: "nvme",
                ours: find(
                    &mut guest,
                    FIND_NVME,
                    "OUR-nvme",
                    " BAR ",
                    Some(nvme_control),
                ),
                qemus: find(&mut guest, FIND_NVME, "QEMU-nvme", "nvme", None),
            },
            Pair {
                name: "ahci",
                ours: find(
                    &mut guest,
                    FIND_AHCI,
                    "OUR-ahci",
                    " BAR ",
                    Some(ahci_control),
                ),
                qemus: find(&mut guest, FIND_AHCI, "QEMU-ahci", "ahci", None),
            },
        ];
        Self {
            guest,
            servers,
            pairs,
            trace,
            _workplace: workplace,
        }
    }

    /// How many devices there are.
    pub(crate) fn devices(&self) -> usize {
        self.pairs.len()
    }

    /// What a row is called.
    pub(crate) fn name(&self, device: usize, work: Work) -> String {
        let Work { how, depth } = work;
        format!("{}, {how}, {depth} in flight", self.pairs[device].name)
    }

    /// Measures a row: the pairs in turn, and then what it costs.
    pub(crate) fn compare(&mut self, plan: &Plan, device: usize, work: Work) -> Row {
        let name = self.name(device, work);
        let Pair { ours, qemus, .. } = &self.pairs[device];
        let limit = format!("--time_based --runtime={}", plan.seconds);
        let guest = &mut self.guest;
        // Caches and clocks get used to the work.
        for disk in [ours, qemus] {
            fio(guest, disk, work, "--time_based --runtime=1");
        }
        let runs = (0..plan.pairs).map(|pair| {
            if pair % 2 == 0 {
                let first = fio(guest, ours, work, &limit);
                (first, fio(guest, qemus, work, &limit))
            } else {
                let first = fio(guest, qemus, work, &limit);
                (fio(guest, ours, work, &limit), first)
            }
        });
        let runs = runs.collect();
        Row {
            name,
            runs,
            ours: cost(guest, &self.trace, plan, ours, work),
            qemus: cost(guest, &self.trace, plan, qemus, work),
        }
    }

    /// Ends the guest, and then the servers.
    pub(crate) fn stop(mut self) {
        self.guest.finish();
        for server in &mut self.servers {
            server.stop();
        }
    }
}

/// Makes an image of random bytes.
fn fill(image: &Path, size: u64) {
    let mut file = File::create(image).expect("an image");
    let random = File::open("/dev/urandom").expect("random bytes");
    io::copy(&mut random.take(size), &mut file).expect("an image");
    // Writing it back would be part of the measurement.
    file.sync_all().expect("an image");
}

/// Finds a disk in the guest by a serial number.
fn find(
    guest: &mut Guest,
    script: &str,
    serial: &str,
    registers: &'static str,
    control: Option<PathBuf>,
) -> Disk {
    let found = guest.wait_for(&script.replace("SERIAL", serial));
    let (pci, device) = found.trim().split_once(' ').expect("two words");
    Disk {
        device: device.to_owned(),
        pci: pci.to_owned(),
        registers,
        control,
    }
}

/// Runs fio on a disk; gives its accesses a second.
fn fio(guest: &mut Guest, disk: &Disk, work: Work, limit: &str) -> f64 {
    let Work { how, depth } = work;
    let report = guest.ok(&format!(
        "fio --name=measured --filename={} --direct=1 --ioengine=libaio --rw={how} --bs=4k --iodepth={depth} \
        {OPTIONS} {limit} --eta=never --output-format=terse --terse-version=3 --output=/tmp/report
        grep '^3;' /tmp/report",
        disk.device
    ));
    // Of version 3 of this format: accesses a second that read, and that wrote.
    let fields: Vec<&str> = report.split(';').collect();
    let field = |number: usize| fields.get(number - 1).and_then(|field| field.parse().ok());
    let rate = field(if how == "randread" { 8 } else { 49 });
    rate.unwrap_or_else(|| panic!("fio reports: {report}"))
}

/// Lets QEMU write down accesses to registers, or not.
fn trace(guest: &mut Guest, enable: bool) {
    for event in ["memory_region_ops_read", "memory_region_ops_write"] {
        guest.monitor(
            "trace-event-set-state",
            &json!({"name": event, "enable": enable}),
        );
    }
}

/// Interrupts of a function that the guest has handled so far.
fn interrupts(guest: &mut Guest, disk: &Disk) -> u64 {
    let lines = guest.ok(&format!(
        "cd /sys/bus/pci/devices/{}
        for irq in $(ls msi_irqs 2> /dev/null || cat irq); do grep \"^ *$irq:\" /proc/interrupts || true; done",
        disk.pci
    ));
    let counts = lines.lines().flat_map(|line| {
        let fields = line.split_whitespace().skip(1);
        fields.map_while(|field| field.parse::<u64>().ok())
    });
    counts.sum()
}

/// Times the server of a disk found something to do so far.
fn drains(disk: &Disk) -> Option<u64> {
    let counters = ctl(disk.control.as_ref()?, &["counters"]);
    let mut queues = Vec::new();
    if let Some(ports) = counters["ports"].as_array() {
        queues.extend(ports);
    }
    for controller in counters["controllers"].as_array().into_iter().flatten() {
        queues.extend(controller["workers"].as_array().into_iter().flatten());
    }
    let drains = |queue: &&Value| queue["batches"].as_u64();
    Some(queues.iter().filter_map(drains).sum())
}

/// Runs fio once more and counts.
fn cost(guest: &mut Guest, log: &Path, plan: &Plan, disk: &Disk, work: Work) -> Cost {
    let before = (interrupts(guest, disk), drains(disk));
    let written = fs::metadata(log).map_or(0, |data| data.len()) as usize;
    trace(guest, true);
    fio(guest, disk, work, &format!("--number_ios={}", plan.count));
    trace(guest, false);
    let after = (interrupts(guest, disk), drains(disk));
    let lines = fs::read(log).expect("QEMU's log");
    let lines = String::from_utf8_lossy(lines.get(written..).unwrap_or_default()).into_owned();
    let accesses = |event: &str| {
        let of_disk = lines.lines().filter(|line| {
            let name = line.split_once("name '").map_or("", |(_, name)| name);
            line.contains(event) && name.contains(disk.registers)
        });
        of_disk.count() as f64 / f64::from(plan.count)
    };
    let each = |before: u64, after: u64| (after - before) as f64 / f64::from(plan.count);
    Cost {
        writes: accesses("memory_region_ops_write"),
        reads: accesses("memory_region_ops_read"),
        interrupts: each(before.0, after.0),
        drains: before.1.zip(after.1).map(|(b, a)| each(b, a)),
    }
}
