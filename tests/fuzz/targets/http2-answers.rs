#![no_main]

use silo_proxy::{agent, server};

libfuzzer_sys::fuzz_target!(|data: &[u8]| agent::fuzz::answers(data, server::fuzz::answered));
