//! Pure, versioned codecs: the frames of the device stream and the events of the log.

pub mod event;
pub mod group_event;
pub mod padding;
/// The Protobuf types of `schemas/stream.proto`.
#[allow(missing_docs, clippy::doc_markdown, reason = "generated; the schema is the documentation")]
pub mod stream {
    include!(concat!(env!("OUT_DIR"), "/sealpost.stream.v1.rs"));
}

/// The Protobuf types of `schemas/metadata.proto`.
#[allow(missing_docs, clippy::doc_markdown, reason = "generated; the schema is the documentation")]
pub mod metadata {
    include!(concat!(env!("OUT_DIR"), "/sealpost.metadata.v1.rs"));
}
