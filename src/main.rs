//! The `sealpost` binary: broker, chat, demo and load tool in one.

// Many small, short-lived buffers on two cores: measured against the system allocator in docs/measurements.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    sealpost::cli::main()
}
