//! Operation codes.

/// Of admin commands.
pub(super) mod admin {
    pub(in crate::nvme) const DELETE_SQ: u8 = 0x00;
    pub(in crate::nvme) const CREATE_SQ: u8 = 0x01;
    pub(in crate::nvme) const GET_LOG_PAGE: u8 = 0x02;
    pub(in crate::nvme) const DELETE_CQ: u8 = 0x04;
    pub(in crate::nvme) const CREATE_CQ: u8 = 0x05;
    pub(in crate::nvme) const IDENTIFY: u8 = 0x06;
    pub(in crate::nvme) const ABORT: u8 = 0x08;
    pub(in crate::nvme) const SET_FEATURES: u8 = 0x09;
    pub(in crate::nvme) const GET_FEATURES: u8 = 0x0a;
    pub(in crate::nvme) const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    pub(in crate::nvme) const NAMESPACE_MANAGEMENT: u8 = 0x0d;
    pub(in crate::nvme) const NAMESPACE_ATTACHMENT: u8 = 0x15;
    pub(in crate::nvme) const DOORBELL_BUFFER_CONFIG: u8 = 0x7c;
    pub(in crate::nvme) const FORMAT_NVM: u8 = 0x80;
    pub(in crate::nvme) const SANITIZE: u8 = 0x84;
}

/// Of I/O commands of the NVM command set.
pub(super) mod io {
    pub(in crate::nvme) const FLUSH: u8 = 0x00;
    pub(in crate::nvme) const WRITE: u8 = 0x01;
    pub(in crate::nvme) const READ: u8 = 0x02;
    pub(in crate::nvme) const WRITE_UNCORRECTABLE: u8 = 0x04;
    pub(in crate::nvme) const COMPARE: u8 = 0x05;
    pub(in crate::nvme) const WRITE_ZEROES: u8 = 0x08;
    pub(in crate::nvme) const DATASET_MANAGEMENT: u8 = 0x09;
    pub(in crate::nvme) const VERIFY: u8 = 0x0c;
    pub(in crate::nvme) const RESERVATION_REGISTER: u8 = 0x0d;
    pub(in crate::nvme) const RESERVATION_REPORT: u8 = 0x0e;
    pub(in crate::nvme) const RESERVATION_ACQUIRE: u8 = 0x11;
    pub(in crate::nvme) const RESERVATION_RELEASE: u8 = 0x15;
    pub(in crate::nvme) const COPY: u8 = 0x19;
}
