//! Crate `virtio-devices`.
