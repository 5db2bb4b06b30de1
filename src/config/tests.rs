use super::*;

fn from_env(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::load(None, variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
}

fn realm(text: &str) -> Config {
    let text = format!("listen = \"0.0.0.0:1\"\n[[realms]]\nname = \"a\"\nissuer = \"i\"\naudience = \"s\"\n{text}");
    toml::from_str(&text).expect("parses")
}

#[test]
fn nothing_configured_is_development_on_loopback() {
    let config = from_env(&[]).expect("loads");
    config.validate().expect("valid");
    assert!(config.dev_mode());
    assert_eq!(config.rates(), Rates::default());
    assert_eq!(config.listen.to_string(), "127.0.0.1:8470");
}

#[test]
fn an_open_address_needs_realms_or_an_explicit_wish() {
    let error = from_env(&[("SEALPOST_LISTEN", "0.0.0.0:8470")]).expect("loads").validate().expect_err("refused");
    assert!(error.to_string().starts_with("realms: there is none"), "{error}");
    from_env(&[("SEALPOST_LISTEN", "0.0.0.0:8470"), ("SEALPOST_DEV", "true")]).expect("loads").validate().expect("valid");
    assert!(from_env(&[("SEALPOST_DEV", "false")]).expect("loads").validate().is_err());
}

#[test]
fn realms_turn_development_off_and_limits_on() {
    let config = realm("jwks_file = \"keys.json\"");
    config.validate().expect("valid");
    assert!(!config.dev_mode());
    assert_eq!((config.rates().requests_per_device_per_s, config.connections_per_ip()), (50, 256));
    let config = realm("jwks_url = \"https://example.org/keys\"\n[limits]\nrequests_per_device_per_s = 7");
    config.validate().expect("valid");
    assert_eq!(config.rates().requests_per_device_per_s, 7);
}

#[test]
fn wrong_realms_are_refused_with_their_key() {
    for (text, key) in [
        ("", "realms.a.jwks_url"),
        ("jwks_file = \"f\"\njwks_url = \"https://h/\"", "realms.a.jwks_url"),
        ("jwks_url = \"http://example.org/\"", "realms.a.jwks_url"),
        ("jwks_file = \"f\"\njwks_ca = \"f\"", "realms.a.jwks_ca"),
        ("jwks_url = \"http://localhost/\"\njwks_ca = \"f\"", "realms.a.jwks_ca"),
        ("jwks_file = \"f\"\nalgorithms = []", "realms.a.algorithms"),
        ("jwks_file = \"f\"\n[[realms]]\nname = \"a\"\nissuer = \"j\"\naudience = \"s\"\njwks_file = \"f\"", "realms.a.name"),
        ("jwks_file = \"f\"\n[[realms]]\nname = \"b\"\nissuer = \"i\"\naudience = \"s\"\njwks_file = \"f\"", "realms.b.audience"),
    ] {
        let error = realm(text).validate().expect_err(text);
        assert!(matches!(&error, ConfigError::Invalid { key: k, .. } if k == key), "{error}");
    }
    assert!(toml::from_str::<Config>("[[realms]]\nname = \"a\"\nissuer = \"i\"\naudience = \"s\"\nalgorithms = [\"HS256\"]").is_err());
}

#[test]
fn variables_reach_every_level_and_wrong_ones_are_named() {
    let config = from_env(&[
        ("SEALPOST_DATA", "123"),
        ("SEALPOST_LOG__RETENTION_DAYS", "7"),
        ("SEALPOST_TLS__CERT", "c.pem"),
        ("SEALPOST_TLS__KEY", "k.pem"),
        ("SEALPOST_METRICS__TOKEN", "0123456789abcdef"),
        ("SEALPOST_REALMS", r#"[{ name = "r", issuer = "i", audience = "a", jwks_url = "http://127.0.0.1:1/k" }]"#),
        ("SEALPOST_CONFIG", "elsewhere"),
        ("SEALPOST_KILL_ROUNDS", "200"),
        ("UNRELATED", "x"),
    ])
    .expect("loads");
    config.validate().expect("valid");
    assert_eq!((config.data.to_str(), config.log.retention_days, config.realms.len()), (Some("123"), 7, 1));
    for (name, value) in
        [("SEALPOST_LISTN", "1"), ("SEALPOST_LOG__RETENTION_DAYS", "\"x\""), ("SEALPOST_DEV", "maybe"), ("SEALPOST_DATA__X", "1")]
    {
        let error = from_env(&[("SEALPOST_DATA", "d"), (name, value)]).expect_err(name);
        assert!(error.to_string().contains(name), "{error}");
    }
    let error = from_env(&[("SEALPOST_TLS__CERT", "c.pem")]).expect_err("half of it");
    assert!(error.to_string().contains("key"), "{error}");
}

#[test]
fn a_cluster_fits_into_variables() {
    let config = from_env(&[
        ("SEALPOST_ROLE", "projector"),
        ("SEALPOST_KAFKA__BROKERS", "k:9092"),
        ("SEALPOST_KAFKA__SASL__MECHANISM", "SCRAM-SHA-512"),
        ("SEALPOST_KAFKA__SASL__USERNAME", "u"),
        ("SEALPOST_KAFKA__SASL__PASSWORD", "hush"),
        ("SEALPOST_KAFKA__TLS__CA", "ca.pem"),
        ("SEALPOST_CQL__KEYSPACE", "k"),
        ("SEALPOST_CQL__HOSTS", "c:9042"),
    ])
    .expect("loads");
    config.validate().expect("valid");
    assert!(config.is_cluster() && config.kafka.is_some_and(|kafka| kafka.sasl.is_some() && kafka.tls.is_some()));
    // Where is said by a flag, perhaps.
    let config = from_env(&[("SEALPOST_KAFKA__PREFIX", "p-"), ("SEALPOST_CQL__KEYSPACE", "k")]).expect("loads");
    assert!(config.validate().expect_err("nowhere").to_string().starts_with("kafka.brokers"));
    let error = from_env(&[("SEALPOST_KAFKA__SASL__USERNAME", "u")]).expect_err("half of it").to_string();
    assert!(error.contains("mechanism"), "{error}");
}

#[test]
fn unknown_keys_of_a_file_are_shown_with_their_line() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("sealpost.toml");
    std::fs::write(&path, "dev = true\n[log]\nsegment_byte = 1\n").expect("writes");
    let error = Config::load(Some(&path), []).expect_err("refused").to_string();
    assert!(error.contains("line 3") && error.contains("segment_byte"), "{error}");
    assert!(matches!(Config::load(Some(&dir.path().join("none")), []), Err(ConfigError::Unreadable { .. })));
}

#[test]
fn values_out_of_range_are_refused_with_their_key() {
    for (name, value, key) in [
        ("SEALPOST_LOG__SEGMENT_BYTES", "1048575", "log.segment_bytes"),
        ("SEALPOST_LOG__RETENTION_DAYS", "0", "log.retention_days"),
        ("SEALPOST_LOG__RETENTION_BYTES", "1", "log.retention_bytes"),
        ("SEALPOST_PARTITIONS__INBOX", "0", "partitions.inbox"),
        ("SEALPOST_LIMITS__CONNECTIONS", "0", "limits.connections"),
        ("SEALPOST_TIMEOUTS__REQUEST_MS", "99", "timeouts.request_ms"),
        ("SEALPOST_TIMEOUTS__DRAIN_MS", "600001", "timeouts.drain_ms"),
        ("SEALPOST_METRICS__TOKEN", "short", "metrics.token"),
    ] {
        let error = from_env(&[(name, value)]).expect("loads").validate().expect_err(name);
        assert!(matches!(&error, ConfigError::Invalid { key: k, .. } if k == key), "{error}");
    }
}

/// The example for operators says what holds, and every key that is commented out exists.
#[test]
fn the_example_file_is_the_defaults() {
    let text = include_str!("../../docs/sealpost.example.toml");
    let example: Config = toml::from_str(text).expect("parses");
    assert_eq!(format!("{example:?}"), format!("{:?}", Config::default()));
    let key = |line: &str| {
        line.strip_prefix("# ").is_some_and(|rest| rest.starts_with('[') || rest.split_once(" = ").is_some_and(|(k, _)| !k.contains(' ')))
    };
    // Realms last, so that the keys of the sections before them stay theirs.
    let (realms, others): (Vec<_>, Vec<_>) = {
        let lines: Vec<_> = text.lines().map(|line| if key(line) { &line[2..] } else { line }).collect();
        let from = lines.iter().position(|line| *line == "[[realms]]").expect("there");
        let to = lines.iter().position(|line| *line == "[limits]").expect("there");
        (lines[from..to].to_vec(), [&lines[..from], &lines[to..]].concat())
    };
    let all: Config = toml::from_str(&[others, realms].concat().join("\n")).expect("parses with everything");
    all.validate().expect("valid");
    let mut limits = Config { dev: Some(false), ..all.clone() };
    limits.limits = Limits::default();
    assert_eq!(all.rates(), limits.rates(), "the rates that are written are the defaults");
}

#[test]
fn secrets_are_not_printed() {
    let config = from_env(&[("SEALPOST_METRICS__TOKEN", "0123456789abcdef")]).expect("loads");
    assert!(!format!("{config:?}").contains("0123"));
    assert_eq!(config.metrics.token.expect("set").expose(), "0123456789abcdef");
}
