//! The `platter` program.

fn main() {}
