//! One exchange at a time, and what may become of it.

use super::*;

#[test]
fn the_queue_of_turns_does_not_grow_with_exchanges_that_never_went_out() {
    let mut pair = Pair::new();
    let _kept = pair.opener.open(get("/kept"), true).unwrap();
    for _ in 0..1000 {
        let key = pair.opener.open(get("/left"), true).unwrap();
        pair.opener.abort(key, Reason::Cancelled);
        pair.opener.release(key);
    }
    assert!(pair.opener.longest_queue() <= 2);
}
