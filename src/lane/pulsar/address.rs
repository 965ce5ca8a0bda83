//! Where brokers are: the URLs of the settings, and what a lookup answers.

/// Where a broker is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    pub host: String,
    pub port: u16,
    pub tls: bool,
    /// The broker that a proxy at this address shall pass us on to.
    pub behind: Option<String>,
}

impl Address {
    pub fn parse(url: &str) -> Option<Self> {
        let (tls, rest) = match url.strip_prefix("pulsar+ssl://") {
            Some(rest) => (true, rest),
            None => (false, url.strip_prefix("pulsar://")?),
        };
        let rest = rest.trim_end_matches('/');
        let default = if tls { 6651 } else { 6650 };
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !host.ends_with(':') => (host, port.parse().ok()?),
            _ => (rest, default),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        (!host.is_empty()).then(|| Self { host: host.into(), port, tls, behind: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_pulsar_url_and_nothing_else() {
        let parsed = |url| Address::parse(url).map(|a| (a.host, a.port, a.tls));
        assert_eq!(parsed("pulsar://a.b:1234"), Some(("a.b".into(), 1234, false)));
        assert_eq!(parsed("pulsar+ssl://a.b/"), Some(("a.b".into(), 6651, true)));
        assert_eq!(parsed("pulsar://[::1]:7"), Some(("::1".into(), 7, false)));
        for bad in ["http://a", "pulsar://", "pulsar://a:b", "a:6650"] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }
}
