//! The registers of an HBA (AHCI 1.3.1, section 3): offsets and bits.
#![allow(missing_docs, reason = "the names are those of the specification")]

/// Generic host control: offsets.
pub const CAP: u64 = 0x00;
pub const GHC: u64 = 0x04;
pub const IS: u64 = 0x08;
pub const PI: u64 = 0x0c;
pub const VS: u64 = 0x10;
pub const CCC_CTL: u64 = 0x14;
pub const CCC_PORTS: u64 = 0x18;

/// Where the ports start, and how far apart they are.
pub const PORTS: u64 = 0x100;
pub const PORT_SIZE: u64 = 0x80;

/// CAP.
pub mod cap {
    pub const CCCS: u32 = 1 << 7;
    pub const NCS_32: u32 = 31 << 8;
    pub const PMD: u32 = 1 << 15;
    pub const SAM: u32 = 1 << 18;
    pub const ISS_GEN3: u32 = 3 << 20;
    pub const SCLO: u32 = 1 << 24;
    pub const SSS: u32 = 1 << 27;
    pub const SNCQ: u32 = 1 << 30;
    pub const S64A: u32 = 1 << 31;
}

/// GHC.
pub mod ghc {
    pub const HR: u32 = 1 << 0;
    pub const IE: u32 = 1 << 1;
    pub const AE: u32 = 1 << 31;
}

/// A port's registers: offsets.
pub mod px {
    pub const CLB: u64 = 0x00;
    pub const CLBU: u64 = 0x04;
    pub const FB: u64 = 0x08;
    pub const FBU: u64 = 0x0c;
    pub const IS: u64 = 0x10;
    pub const IE: u64 = 0x14;
    pub const CMD: u64 = 0x18;
    pub const TFD: u64 = 0x20;
    pub const SIG: u64 = 0x24;
    pub const SSTS: u64 = 0x28;
    pub const SCTL: u64 = 0x2c;
    pub const SERR: u64 = 0x30;
    pub const SACT: u64 = 0x34;
    pub const CI: u64 = 0x38;
}

/// PxCMD.
pub mod cmd {
    pub const ST: u32 = 1 << 0;
    pub const SUD: u32 = 1 << 1;
    pub const POD: u32 = 1 << 2;
    pub const CLO: u32 = 1 << 3;
    pub const FRE: u32 = 1 << 4;
    pub const CCS_SHIFT: u32 = 8;
    pub const CCS: u32 = 0x1f << 8;
    pub const FR: u32 = 1 << 14;
    pub const CR: u32 = 1 << 15;
    pub const HPCP: u32 = 1 << 18;
    pub const ATAPI: u32 = 1 << 24;
}

/// PxIS and PxIE.
pub mod is {
    pub const DHRS: u32 = 1 << 0;
    pub const PSS: u32 = 1 << 1;
    pub const SDBS: u32 = 1 << 3;
    pub const DPS: u32 = 1 << 5;
    pub const PCS: u32 = 1 << 6;
    pub const PRCS: u32 = 1 << 22;
    pub const OFS: u32 = 1 << 24;
    pub const IFS: u32 = 1 << 27;
    pub const HBFS: u32 = 1 << 29;
    pub const TFES: u32 = 1 << 30;
    /// What PxIE can enable.
    pub const ALL: u32 = 0xfdc0_00ff;
}

/// PxSERR.
pub mod serr {
    /// Internal error: an FIS that nobody understands.
    pub const ERR_P: u32 = 1 << 10;
    /// PhyRdy changed.
    pub const DIAG_N: u32 = 1 << 16;
    /// A COMINIT came: a device was plugged in, or answered a reset.
    pub const DIAG_X: u32 = 1 << 26;
}

/// What PxTFD is while no device has said anything.
pub const TFD_NONE: u32 = 0x7f;

/// What PxSIG is while no device has said anything.
pub const SIG_NONE: u32 = 0xffff_ffff;
