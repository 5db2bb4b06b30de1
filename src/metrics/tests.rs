use super::*;

#[test]
fn labels_stand_at_their_variants_index() {
    assert!(Refusal::ALL.iter().enumerate().all(|(i, v)| v.0 as usize == i));
    assert!(Proof::ALL.iter().enumerate().all(|(i, v)| v.0 as usize == i));
    assert!(RateScope::ALL.iter().enumerate().all(|(i, v)| v.0 as usize == i));
    assert!(Prekey::ALL.iter().enumerate().all(|(i, v)| v.0 as usize == i));
    assert!(Moved::ALL.iter().enumerate().all(|(i, v)| v.0 as usize == i));
    assert!(StoreCall::ALL.iter().enumerate().all(|(i, v)| v.0 as usize == i));
    assert!(PrekeyOutcome::ALL.iter().enumerate().all(|(i, v)| v.0 as usize == i));
}

#[test]
fn what_is_observed_is_rendered_with_its_labels() {
    let exporter = install();
    observe_request(204, Duration::from_millis(3));
    observe_sends(Code::DeviceMismatch, 2);
    observe_one_time(Prekey::Pq, PrekeyOutcome::Protected);
    observe_stream_opened();
    observe_stream_closed(CloseReason::Replaced);
    install().run_upkeep();
    let text = exporter.render();
    for line in [
        "sealpost_http_requests_total{status=\"2xx\"} ",
        "sealpost_http_request_seconds_bucket{le=\"0.005\"} ",
        "sealpost_send_results_total{code=\"DEVICE_MISMATCH\"} ",
        "sealpost_keys_one_time_total{kind=\"pq\",outcome=\"protected\"} ",
        "sealpost_stream_closed_total{reason=\"REPLACED\"} ",
        "# HELP sealpost_projector_lag_records",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    assert!(observe_nothing_out_of_range());
}

#[cfg(target_os = "linux")]
#[test]
fn the_process_is_looked_at() {
    let exporter = install();
    observe_process();
    let text = exporter.render();
    let resident = text.lines().find_map(|line| line.strip_prefix("sealpost_process_resident_bytes ")).expect("rendered");
    assert!(resident.parse::<f64>().expect("a number") > 1e5, "{resident}");
    assert!(text.contains("sealpost_process_cpu_seconds "));
    assert_eq!(process_usage("0"), None);
    observe_disk(Path::new("/nowhere/at/all"));
    observe_disk(Path::new("/"));
    let text = exporter.render();
    let total = text.lines().find_map(|line| line.strip_prefix("sealpost_disk_total_bytes ")).expect("rendered");
    assert!(total.parse::<f64>().expect("a number") > 1e6, "{total}");
}

fn observe_nothing_out_of_range() -> bool {
    observe_request(0, Duration::ZERO);
    observe_request(999, Duration::ZERO);
    true
}
