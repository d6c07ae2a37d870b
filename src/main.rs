//! The `silo-proxy` binary: the command line, and the allocator.

/// jemalloc keeps an idle tunnel at half of what other allocators make of it, since it returns
/// what short-lived buffers took.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// How jemalloc is set, but for what its environment variable says: memory that wasn't used for
/// five seconds goes back to the system. With its ten, a burst is felt for longer than that.
///
/// The attribute is unsafe because another definition of the symbol, or one of another type, would
/// be undefined behaviour. jemalloc's own is weak, in order to be replaced, and a `const char *` to
/// a string that ends with a NUL; a reference to an array is such a pointer. Its `_rjem_` is the
/// prefix that tikv-jemallocator gives to all of its symbols.
#[cfg(target_os = "linux")]
#[expect(
    unsafe_code,
    reason = "the only way to set it at build time; see above"
)]
#[used]
#[unsafe(export_name = "_rjem_malloc_conf")]
static ALLOCATOR_SETTINGS: &[u8; 20] = b"dirty_decay_ms:5000\0";

fn main() -> std::process::ExitCode {
    silo_proxy::cli::run()
}
