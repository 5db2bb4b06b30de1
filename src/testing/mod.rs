//! Faulty stores and more, for tests.

pub mod faulty_store;
pub mod process;
