//! Crate `vmm-glue`.
