//! TLS under an authority of one's own: the SDK by HTTPS and on the stream, the terminal tools, and a realm's keys.

#[path = "support/certificate.rs"]
mod certificate;
#[path = "support/realm.rs"]
mod realm;
#[path = "support/sdk.rs"]
mod sdk;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use certificate::Certificate;
use realm::SigningKey;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sdk::{has, live, texts, until};
use sealpost::auth::realm::{Realms, TokenError};
use sealpost::client::{Client, Environment, PrivateCa, dev_token, dev_token_with};
use sealpost::clock::{Clock as _, ManualClock, SystemClock};
use sealpost::config::{Config, Tls};
use sealpost::limits;
use sealpost::server::Broker;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A broker that only its own certificate vouches for.
struct Secure {
    dir: TempDir,
    broker: Broker,
    ca: PathBuf,
}

impl Secure {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let made = Certificate::for_localhost();
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        std::fs::write(&cert, &made.cert_pem).expect("writes");
        std::fs::write(&key, &made.key_pem).expect("writes");
        let config = Config {
            data: dir.path().join("data"),
            listen: ([127, 0, 0, 1], 0).into(),
            dev: Some(true),
            tls: Some(Tls { cert: cert.clone(), key }),
            ..Config::default()
        };
        let broker = Broker::start(config).await.expect("starts");
        assert!(broker.url().starts_with("https://"));
        Self { dir, broker, ca: cert }
    }

    fn environment(&self) -> Environment {
        Environment { ca: Some(PrivateCa::from_file(&self.ca).expect("a certificate")), ..Environment::default() }
    }

    async fn device(&self, identity: &str, name: &str) -> Client {
        let (url, environment) = (self.broker.url(), self.environment());
        let token = dev_token_with(&url, &identity.parse().expect("an identity"), &environment).await.expect("a token");
        let path = self.dir.path().join(name);
        let client = Client::register_with(&url, vec![token], name, path, environment).await.expect("registered");
        client.start();
        live(&client).await;
        client
    }

    /// The program with arguments, and lines for it.
    async fn program(&self, args: &[&str], input: &str) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealpost"));
        command.args(args).args(["--server", &self.broker.url()]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let input = input.to_owned();
        let run = tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().expect("runs");
            std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), input.as_bytes()).expect("writes");
            child.wait_with_output().expect("ends")
        });
        run.await.expect("ends")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sdk_talks_over_https_and_wss_to_whom_its_authority_vouches_for() {
    let secure = Secure::start().await;
    let (alice, bob) = (secure.device("alice@socialink", "alice").await, secure.device("bob@vignette", "bob").await);
    alice.send_text("bob@vignette", "hello").await.expect("sent");
    has(&bob, alice.account(), &["hello"]).await;
    bob.send_text(alice.account(), "hi").await.expect("sent");
    has(&alice, bob.account(), &["hello", "hi"]).await;
    // What vouches is said each time, not kept.
    alice.close().await;
    let path = secure.dir.path().join("alice");
    let alice = Client::open_with(&path, secure.environment()).await.expect("opens");
    alice.start();
    live(&alice).await;
    bob.send_text(alice.account(), "again").await.expect("sent");
    until("it came", async || texts(&alice, bob.account()).await.len() == 3).await;

    // Neither the public authorities nor another one's vouch for it.
    let identity = "carol@local".parse().expect("an identity");
    let other = PrivateCa::from_pem(Certificate::for_localhost().cert_pem.as_bytes()).expect("a certificate");
    let other = Environment { ca: Some(other), ..Environment::default() };
    for outcome in [dev_token(&secure.broker.url(), &identity).await, dev_token_with(&secure.broker.url(), &identity, &other).await] {
        let error = outcome.expect_err("refused").to_string();
        assert!(error.to_lowercase().contains("certificate"), "{error}");
    }
    for client in [alice, bob] {
        client.close().await;
    }
    // On the stream likewise.
    let alice = Client::open_with(&path, other).await.expect("opens");
    let mut connection = alice.connection();
    alice.start();
    let waits = connection.wait_for(|now| *now == sealpost::client::Connection::Waiting);
    assert!(tokio::time::timeout(sdk::PATIENCE, waits).await.is_ok_and(|seen| seen.is_ok()), "it does not connect");
    alice.close().await;
    secure.broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_terminal_tools_take_a_file_of_certificates() {
    let secure = Secure::start().await;
    let (ca, data) = (secure.ca.to_str().expect("text"), secure.dir.path().join("chat"));
    let bob = secure.device("bob@vignette", "bob").await;
    let data = data.to_str().expect("text");
    let chat = ["chat", "--as", "alice@socialink", "--to", "bob@vignette", "--plain", "--data", data];
    let refused = secure.program(&chat, "").await;
    assert!(!refused.status.success(), "{refused:?}");
    let sent = secure.program(&[&chat[..], &["--ca", ca]].concat(), "over TLS\n").await;
    assert!(sent.status.success(), "{sent:?}");
    until("it came", async || bob.conversations().await.expect("read").len() == 1).await;
    let alice = bob.conversations().await.expect("read")[0].account;
    has(&bob, alice, &["over TLS"]).await;
    bob.close().await;

    let load = ["load", "--senders", "3", "--recipients", "3", "--window", "8", "--payload", "2000", "--seconds", "1", "--json"];
    let refused = secure.program(&load, "").await;
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("--ca"), "{refused:?}");
    for more in [&["--ca", ca][..], &["--ca", ca, "--http"]] {
        let run = secure.program(&[&load[..], more].concat(), "").await;
        assert!(run.status.success(), "{run:?}");
        let report: Value = serde_json::from_slice(&run.stdout).expect("JSON");
        assert!(report["delivered"].as_u64().is_some_and(|count| count > 100), "{report}");
        assert_eq!((&report["lost"], &report["duplicates"]), (&json!(0), &json!(0)), "{report}");
    }
    secure.broker.stop().await;
}

/// Serves a document to whoever speaks TLS.
async fn serve(made: &Certificate, body: String) -> std::net::SocketAddr {
    let chain = vec![CertificateDer::from(made.der.clone())];
    let key = PrivateKeyDer::from_pem_slice(made.key_pem.as_bytes()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let config = config.with_no_client_auth().with_single_cert(chain, key).expect("they match");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(socket).await else { continue };
            let _ = stream.read(&mut [0; 4096]).await;
            let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    address
}

#[tokio::test]
async fn a_realms_keys_come_over_https_from_whom_its_authority_vouches_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let (made, key) = (Certificate::for_localhost(), SigningKey::eddsa("ed"));
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, &made.cert_pem).expect("writes");
    let address = serve(&made, json!({ "keys": [key.public] }).to_string()).await;
    let clock = Arc::new(ManualClock::new(SystemClock.now()));
    let token = key.sign(&json!({ "iss": "https://id.example", "aud": "sealpost", "sub": "alice", "exp": clock.now().0 / 1000 + 600 }));
    let open = async |more: &str| {
        let text = format!(
            "name = \"r\"\nissuer = \"https://id.example\"\naudience = \"sealpost\"\njwks_url = \"https://{address}/keys\"\n{more}"
        );
        Realms::open(&[toml::from_str(&text).expect("parses")], None, clock.clone()).await
    };
    let realms = open(&format!("jwks_ca = \"{}\"", ca.display())).await.expect("opens");
    assert_eq!(realms.verify(&token).await.map(|identity| identity.to_string()), Ok("alice@r".to_owned()));
    // The system's authorities do not vouch for it, nor does another one's.
    let other = dir.path().join("other.pem");
    std::fs::write(&other, Certificate::for_localhost().cert_pem).expect("writes");
    for more in [String::new(), format!("jwks_ca = \"{}\"", other.display())] {
        let realms = open(&more).await.expect("a URL that fails is tried again");
        clock.advance(limits::JWKS_REFRESH_MIN_MS);
        assert_eq!(realms.verify(&token).await, Err(TokenError::KeysUnavailable), "{more}");
    }
    // What can't be read is named at the start.
    std::fs::write(&other, "no certificate").expect("writes");
    for wrong in [other, dir.path().join("nothing.pem")] {
        let error = open(&format!("jwks_ca = \"{}\"", wrong.display())).await.err().expect("refused").to_string();
        assert!(error.contains(wrong.to_str().expect("text")), "{error}");
    }
}
