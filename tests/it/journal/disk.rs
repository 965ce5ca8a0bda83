//! A disk that fails when it is told to, under the log's database file.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io;
use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use redb::backends::FileBackend;
use redb::{BackendError, Database, DatabaseError, StorageBackend};
use twinspan::lane::journal::OpenFile;

#[derive(Debug, Default)]
pub struct Disk {
    faults: Mutex<Faults>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Faults {
    /// Nothing is written at or beyond this many bytes.
    room: Option<u64>,
    /// What becomes of the next fsyncs; those after them succeed.
    syncs: VecDeque<bool>,
    /// All writing fails.
    broken: bool,
    /// Opening fails.
    gone: bool,
    /// Fsyncs wait.
    stuck: bool,
    /// The next reads fail.
    unreadable: u32,
    /// Whoever writes this panics, as redb does over some damaged pages.
    poison: Option<&'static [u8]>,
    /// What a power cut could leave, where somebody wants to know.
    platter: Option<Platter>,
}

/// What is surely on the disk, and what was written since the last fsync and may be there or not.
#[derive(Debug, Default)]
struct Platter {
    synced: Vec<u8>,
    since: Vec<Change>,
    /// What each sector that was written left on the disk, had it been the last; where somebody wants to know.
    torn: Option<Vec<Vec<u8>>>,
}

#[derive(Debug, Clone)]
enum Change {
    Length(u64),
    Bytes(u64, Vec<u8>),
}

/// What a disk writes at once.
const SECTOR: usize = 512;

impl Platter {
    fn write(&mut self, change: Change) {
        if let Some(torn) = &mut self.torn {
            let mut image = self.synced.clone();
            self.since.iter().for_each(|change| apply(&mut image, change));
            if let Change::Bytes(offset, bytes) = &change {
                for (at, sector) in (*offset..).step_by(SECTOR).zip(bytes.chunks(SECTOR)) {
                    // The one that was being written may be neither what it was nor what it is to be. The first of the
                    // file is: a disk writes a sector or does not.
                    if at > 0 {
                        let mut half = image.clone();
                        apply(&mut half, &Change::Bytes(at, vec![0; sector.len()]));
                        torn.push(half);
                    }
                    apply(&mut image, &Change::Bytes(at, sector.to_vec()));
                    torn.push(image.clone());
                }
            }
        }
        self.since.push(change);
    }

    fn sync(&mut self) {
        for change in std::mem::take(&mut self.since) {
            apply(&mut self.synced, &change);
        }
    }
}

fn apply(image: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(length) => image.resize(*length as usize, 0),
        Change::Bytes(offset, bytes) => {
            let end = *offset as usize + bytes.len();
            image.resize(image.len().max(end), 0);
            image[*offset as usize..end].copy_from_slice(bytes);
        }
    }
}

impl Disk {
    pub fn opener(self: &Arc<Self>) -> OpenFile {
        let disk = self.clone();
        Box::new(move |path| disk.open(path))
    }

    fn open(self: &Arc<Self>, path: &Path) -> Result<Database, DatabaseError> {
        if self.faults.lock().unwrap().gone {
            return Err(eio().into());
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let backend = Failing { file: FileBackend::new(file)?, disk: self.clone() };
        // A small cache, so that reads reach the disk.
        Database::builder().set_cache_size(1 << 20).create_with_backend(backend)
    }

    fn set(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.faults.lock().unwrap());
        self.moved.notify_all();
    }

    pub fn has_room_for(&self, bytes: u64) {
        self.set(|faults| faults.room = Some(bytes));
    }

    /// Whether each of the next fsyncs succeeds.
    pub fn syncs(&self, outcomes: impl IntoIterator<Item = bool>) {
        self.set(|faults| faults.syncs.extend(outcomes));
    }

    pub fn is_broken(&self, broken: bool) {
        self.set(|faults| faults.broken = broken);
    }

    pub fn is_gone(&self, gone: bool) {
        self.set(|faults| faults.gone = gone);
    }

    pub fn is_stuck(&self, stuck: bool) {
        self.set(|faults| faults.stuck = stuck);
    }

    pub fn fails_reads(&self, count: u32) {
        self.set(|faults| faults.unreadable = count);
    }

    pub fn panics_over(&self, bytes: &'static [u8]) {
        self.set(|faults| faults.poison = Some(bytes));
    }

    /// From here on, for a file that begins empty.
    pub fn remembers(&self) {
        self.set(|faults| faults.platter = Some(Platter::default()));
    }

    /// What a power cut now could leave: of what no fsync has confirmed, any sectors in any order.
    pub fn after_power_cut(&self) -> Vec<u8> {
        let faults = self.faults.lock().unwrap();
        let platter = faults.platter.as_ref().unwrap();
        let mut image = platter.synced.clone();
        let luck = fastrand::f64();
        for change in &platter.since {
            match change {
                Change::Bytes(offset, bytes) => {
                    for (at, sector) in bytes.chunks(SECTOR).enumerate() {
                        if fastrand::f64() < luck {
                            let offset = offset + (at * SECTOR) as u64;
                            apply(&mut image, &Change::Bytes(offset, sector.to_vec()));
                        }
                    }
                }
                length if fastrand::f64() < luck => apply(&mut image, length),
                Change::Length(_) => {}
            }
        }
        image
    }

    /// Keeps from here on what a crash in the middle of writing would leave.
    pub fn tears(&self) {
        self.set(|faults| faults.platter.as_mut().unwrap().torn = Some(Vec::new()));
    }

    pub fn torn(&self) -> Vec<Vec<u8>> {
        self.faults.lock().unwrap().platter.as_mut().unwrap().torn.take().unwrap()
    }

    fn record(&self, change: Change) {
        if let Some(platter) = &mut self.faults.lock().unwrap().platter {
            platter.write(change);
        }
    }

    fn check_room(&self, end: u64) -> io::Result<()> {
        let faults = self.faults.lock().unwrap();
        match faults.room {
            _ if faults.broken => Err(eio()),
            Some(room) if end > room => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

#[derive(Debug)]
struct Failing {
    file: FileBackend,
    disk: Arc<Disk>,
}

impl StorageBackend for Failing {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut faults = self.disk.faults.lock().unwrap();
        if faults.unreadable > 0 {
            faults.unreadable -= 1;
            return Err(eio());
        }
        drop(faults);
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.file.len()? {
            self.disk.check_room(len)?;
        }
        self.disk.record(Change::Length(len));
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut faults = self.disk.faults.lock().unwrap();
        while faults.stuck {
            faults = self.disk.moved.wait(faults).unwrap();
        }
        let fails = faults.broken || faults.syncs.pop_front() == Some(false);
        if fails {
            return Err(eio());
        }
        faults.platter.iter_mut().for_each(Platter::sync);
        drop(faults);
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.check_room(offset + data.len() as u64)?;
        let poison = self.disk.faults.lock().unwrap().poison;
        if let Some(poison) = poison {
            assert!(!data.windows(poison.len()).any(|found| found == poison), "a damaged page");
        }
        self.disk.record(Change::Bytes(offset, data.to_vec()));
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }
}
