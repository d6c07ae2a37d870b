//! The `silo-proxy` binary: the command line, and the allocator.

/// jemalloc keeps an idle tunnel at half of what other allocators make of it, since it returns
/// what short-lived buffers took.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    silo_proxy::cli::run()
}
