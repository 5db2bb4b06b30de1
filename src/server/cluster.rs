//! Log and stores of the cluster profile.

use std::sync::Arc;

use crate::config::{Config, Kafka, SaslMechanism};
use crate::log::kafka as log;
use crate::server::{Backends, ServerError};

/// How to reach Kafka, as configured.
pub fn kafka_options(kafka: &Kafka) -> log::KafkaOptions {
    let mut options = log::KafkaOptions::new(kafka.brokers.clone());
    options.prefix.clone_from(&kafka.prefix);
    options.session_timeout = std::time::Duration::from_millis(kafka.session_timeout_ms);
    options.tls =
        kafka.tls.as_ref().map(|tls| log::KafkaTls { ca_file: tls.ca.clone(), cert_file: tls.cert.clone(), key_file: tls.key.clone() });
    options.sasl = kafka.sasl.as_ref().map(|sasl| log::KafkaSasl {
        mechanism: match sasl.mechanism {
            SaslMechanism::Plain => log::SaslMechanism::Plain,
            SaslMechanism::ScramSha256 => log::SaslMechanism::ScramSha256,
            SaslMechanism::ScramSha512 => log::SaslMechanism::ScramSha512,
        },
        username: sasl.username.clone(),
        password: sasl.password.expose().clone().into(),
    });
    options
}

/// Opens both; what is missing or wrong is an error that says what to do.
pub(super) async fn open(config: &Arc<Config>) -> Result<Backends, ServerError> {
    let _ = config;
    Err(ServerError("todo".to_owned()))
}
