//! The status of a command: the field of a completion entry, without its phase bit.

use block::ErrorKind;

/// Status field of a completion (base specification 2.0, 3.3.3.2.1): status code in bits 7:0,
/// status code type in bits 10:8, "more" in bit 13, "do not retry" in bit 14.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Status(pub u16);

const DNR: u16 = 1 << 14;
const MORE: u16 = 1 << 13;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: Status = Status($value);)*
    };
}

#[expect(missing_docs, reason = "the names of the specification")]
impl Status {
    statuses! {
        SUCCESS = 0;
        INVALID_OPCODE = 0x01 | DNR;
        INVALID_FIELD = 0x02 | DNR;
        DATA_TRANSFER_ERROR = 0x04;
        INTERNAL_ERROR = 0x06;
        ABORT_REQUESTED = 0x07;
        ABORTED_SQ_DELETION = 0x08;
        ABORTED_FAILED_FUSED = 0x09 | DNR;
        ABORTED_MISSING_FUSED = 0x0a | DNR;
        INVALID_NAMESPACE = 0x0b | DNR;
        COMMAND_SEQUENCE_ERROR = 0x0c | DNR;
        INVALID_SGL_SEGMENT = 0x0d | DNR;
        INVALID_SGL_COUNT = 0x0e | DNR;
        DATA_SGL_LENGTH_INVALID = 0x0f | DNR;
        METADATA_SGL_LENGTH_INVALID = 0x10 | DNR;
        SGL_TYPE_INVALID = 0x11 | DNR;
        PRP_OFFSET_INVALID = 0x13 | DNR;
        ATOMIC_WRITE_UNIT_EXCEEDED = 0x14 | DNR;
        HOST_ID_INCONSISTENT = 0x18 | DNR;
        ABORTED_PREEMPT = 0x1b;
        SANITIZE_FAILED = 0x1c | DNR;
        SANITIZE_IN_PROGRESS = 0x1d;
        NAMESPACE_WRITE_PROTECTED = 0x20 | DNR;
        LBA_OUT_OF_RANGE = 0x80 | DNR;
        CAPACITY_EXCEEDED = 0x81;
        NAMESPACE_NOT_READY = 0x82;
        RESERVATION_CONFLICT = 0x83;
        FORMAT_IN_PROGRESS = 0x84;

        COMPLETION_QUEUE_INVALID = 0x100 | DNR;
        INVALID_QUEUE_ID = 0x101 | DNR;
        INVALID_QUEUE_SIZE = 0x102 | DNR;
        ABORT_LIMIT_EXCEEDED = 0x103;
        AER_LIMIT_EXCEEDED = 0x105 | DNR;
        INVALID_INTERRUPT_VECTOR = 0x108 | DNR;
        INVALID_LOG_PAGE = 0x109 | DNR;
        INVALID_FORMAT = 0x10a | DNR;
        INVALID_QUEUE_DELETION = 0x10c | DNR;
        FEATURE_NOT_SAVEABLE = 0x10d | DNR;
        FEATURE_NOT_CHANGEABLE = 0x10e | DNR;
        FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10f | DNR;
        NAMESPACE_INSUFFICIENT_CAPACITY = 0x115 | DNR;
        NAMESPACE_ID_UNAVAILABLE = 0x116 | DNR;
        NAMESPACE_ALREADY_ATTACHED = 0x118 | DNR;
        NAMESPACE_PRIVATE = 0x119 | DNR;
        NAMESPACE_NOT_ATTACHED = 0x11a | DNR;
        THIN_PROVISIONING_NOT_SUPPORTED = 0x11b | DNR;
        CONTROLLER_LIST_INVALID = 0x11c | DNR;
        IO_COMMAND_SET_NOT_SUPPORTED = 0x129 | DNR;

        CONFLICTING_ATTRIBUTES = 0x180 | DNR;
        INVALID_PROTECTION_INFORMATION = 0x181 | DNR;
        COMMAND_SIZE_LIMIT_EXCEEDED = 0x183 | DNR;

        WRITE_FAULT = 0x280;
        UNRECOVERED_READ_ERROR = 0x281 | DNR;
        COMPARE_FAILURE = 0x285 | DNR;
    }
}

impl Status {
    /// Whether the command succeeded.
    #[must_use]
    pub fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// Status code type and status code, without the bits for "more" and "do not retry".
    #[must_use]
    pub fn code(self) -> u16 {
        self.0 & 0x7ff
    }

    /// The same status, saying that the error log has more.
    pub(super) fn with_more(self) -> Self {
        Self(self.0 | MORE)
    }

    /// What a disk's error while reading or writing is for the guest.
    pub(super) fn of_disk(kind: ErrorKind, write: bool) -> Self {
        match kind {
            ErrorKind::NoSpace => Status::CAPACITY_EXCEEDED,
            ErrorKind::ReadOnly => Status::NAMESPACE_WRITE_PROTECTED,
            ErrorKind::OutOfRange => Status::LBA_OUT_OF_RANGE,
            ErrorKind::Unsupported => Status::INVALID_FIELD,
            ErrorKind::Cancelled => Status::ABORT_REQUESTED,
            _ if write => Status::WRITE_FAULT,
            _ => Status::UNRECOVERED_READ_ERROR,
        }
    }
}
