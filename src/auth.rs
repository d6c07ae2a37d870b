//! Who may use which agent id: credentials and the rule for loopback.
