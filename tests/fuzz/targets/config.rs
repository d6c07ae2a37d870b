#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| silo_proxy::config::fuzz::settings(data));
