//! Crate `block`.
