//! What the processors spent: this process, which makes the load, and the one that carries it.

use std::time::Duration;

/// The kernel counts a process's time in hundredths of a second, on every Linux there is.
const TICK: Duration = Duration::from_millis(10);

/// A process of this machine.
#[derive(Debug, Clone)]
pub struct Process(String);

impl Process {
    /// The one that measures; a lane without the bridge and the crate's client are in it too.
    pub fn own() -> Self {
        Self("self".into())
    }

    /// Whoever listens on that port of this machine, where the kernel tells.
    pub fn listening_on(port: u16) -> Option<Self> {
        let sockets =
            ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
        let inode = sockets.iter().flat_map(|table| table.lines()).find_map(|line| listener(line, port))?;
        let link = format!("socket:[{inode}]");
        let processes = std::fs::read_dir("/proc").ok()?.flatten();
        processes
            .map(|process| process.file_name().to_string_lossy().into_owned())
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
            .find(|name| {
                let handles = std::fs::read_dir(format!("/proc/{name}/fd")).into_iter().flatten().flatten();
                let mut targets = handles.filter_map(|handle| std::fs::read_link(handle.path()).ok());
                targets.any(|target| target.as_os_str() == link.as_str())
            })
            .map(Self)
    }

    /// Processor time so far, in the program and in the kernel for it.
    pub fn used(&self) -> Option<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0)).ok()?;
        // The name stands in parentheses and may hold anything.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
        let mut ticks = || fields.next()?.parse::<u32>().ok();
        Some(TICK * (ticks()? + ticks()?))
    }
}

/// The inode of a listening socket on that port, if the line of `/proc/net/tcp` is about one.
fn listener(line: &str, port: u16) -> Option<&str> {
    const LISTENS: &str = "0A";
    let mut fields = line.split_whitespace().skip(1);
    let (local, state) = (fields.next()?, fields.nth(1)?);
    let is_it = state == LISTENS && u16::from_str_radix(local.rsplit_once(':')?.1, 16) == Ok(port);
    if is_it { fields.nth(5) } else { None }
}

/// Processor time between two moments.
pub struct Meter {
    carrier: Option<(Process, Duration)>,
    own: Duration,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// The process that carried the messages, where there is one to be seen.
    pub carrier: Option<Duration>,
    /// This process.
    pub own: Duration,
}

impl Meter {
    pub fn begin(carrier: Option<&Process>) -> Self {
        let carrier = carrier.and_then(|process| Some((process.clone(), process.used()?)));
        Self { carrier, own: Process::own().used().unwrap_or_default() }
    }

    pub fn spent(&self) -> Spent {
        let carrier =
            self.carrier.as_ref().and_then(|(process, before)| Some(process.used()?.saturating_sub(*before)));
        Spent { carrier, own: Process::own().used().unwrap_or_default().saturating_sub(self.own) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_behind_a_port_is_found_and_its_time_grows() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let found = Process::listening_on(listener.local_addr().unwrap().port()).unwrap();
        assert_eq!(found.0, std::process::id().to_string());
        let before = found.used().unwrap();
        while found.used().unwrap() == before {
            std::hint::black_box((0..10_000).sum::<u64>());
        }
        drop(listener);
        assert!(Process::listening_on(1).is_none());
    }
}
