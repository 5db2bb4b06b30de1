//! Generates the Protobuf types of `schemas/` (needs `protoc`, as libsignal's own build does).

fn main() -> std::io::Result<()> {
    let schemas = ["schemas/stream.proto", "schemas/content.proto", "schemas/metadata.proto"];
    let present: Vec<_> = schemas.into_iter().filter(|path| std::path::Path::new(path).exists()).collect();
    prost_build::Config::new().bytes(["."]).compile_protos(&present, &["schemas"])?;
    println!("cargo::rerun-if-changed=schemas");
    Ok(())
}
