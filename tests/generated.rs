//! The generated code in `src/wire` matches `proto/`.

use std::path::Path;

/// Where the generated code lives, next to the code that uses it.
const GENERATED: &str = "src/wire/silo.tunnel.v1.rs";

#[test]
fn generated_code_matches_the_protocol_definition() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(
        [root.join("proto/silo/tunnel/v1/tunnel.proto")],
        [root.join("proto")],
    )
    .unwrap();
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new()
        .bytes(["."])
        .btree_map(["."])
        .out_dir(out.path())
        .compile_fds(descriptors)
        .unwrap();
    let fresh = std::fs::read_to_string(out.path().join("silo.tunnel.v1.rs")).unwrap();
    let committed = root.join(GENERATED);
    if std::env::var_os("UPDATE_GENERATED").is_some() {
        std::fs::write(&committed, &fresh).unwrap();
    }
    assert!(
        std::fs::read_to_string(&committed).unwrap_or_default() == fresh,
        "{GENERATED} is out of date; run UPDATE_GENERATED=1 cargo test --test generated"
    );
}
