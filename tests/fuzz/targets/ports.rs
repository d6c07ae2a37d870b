#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| silo_proxy::ports::fuzz(data));
