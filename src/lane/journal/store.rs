//! The file under the log: one redb database, opened, guarded and reopened in place.
//!
//! After an I/O error redb refuses everything until it is opened again, so the database stands behind a lock that the
//! writer takes for itself while it does so; whoever reads holds it for one batch and waits that long. A panic in
//! redb, which a damaged page can cause, is caught here and is a failure like any other.

use std::fs::{self, File, TryLockError};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::{Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, WriteTransaction};
use tracing::{error, info};

use super::record::Damaged;
use super::rows::{Cursor, GROUPS, LOG, RECORDS, TIMES, TOPICS, log_row, read_log};
use crate::message::Timestamp;

pub const FILE: &str = "journal.redb";
/// A new file gets its name when it is a whole log: killed before that, the next start begins anew.
const NEW_FILE: &str = "journal.redb.new";
/// Locked while the log is open. The database's own lock is given up while it is reopened.
const LOCK_FILE: &str = "journal.lock";
/// 2: messages have a `deliver_at`, and cursors are stretches. A log of format 1 becomes one of format 2 when it is
/// opened, so that an older twinspan refuses it and does not take what it cannot read for damage.
const FORMAT: u64 = 2;
/// redb takes a GiB unless told otherwise. Followers are served from memory anyway; this is for replays.
const CACHE_BYTES: usize = 64 << 20;

/// Why the log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("cannot create the directory {} for the log", .dir.display())]
    Directory { dir: PathBuf, source: io::Error },
    #[error(
        "the log in {} is open in another twinspan; stop that one, or give this one a `server.data_dir` of its own",
        .0.display()
    )]
    InUse(PathBuf),
    #[error(
        "{} is not a log of twinspan ({what}); nothing was changed. Move it away, or set `server.data_dir` to another \
         directory",
        .file.display()
    )]
    NotOurs { file: PathBuf, what: String },
    #[error("{} was written by a newer twinspan (format {format}, this one reads {FORMAT})", .file.display())]
    Newer { file: PathBuf, format: u64 },
    #[error(
        "the log {} is damaged: {what}. Nothing was changed. Restore it from a copy, or move it away to begin an empty \
         one",
        .file.display()
    )]
    Damaged { file: PathBuf, what: String },
    #[error("cannot open the log {}: {what}", .file.display())]
    Open { file: PathBuf, what: String },
    #[error("cannot start the log's writer thread")]
    Thread(#[source] io::Error),
}

impl JournalError {
    pub fn from(file: &Path, failure: Failure) -> Self {
        match failure.kind {
            FailureKind::Damage => Self::Damaged { file: file.into(), what: failure.what },
            _ => Self::Open { file: file.into(), what: failure.what },
        }
    }
}

/// Why storage did not do what it was asked. Whether the store has to be reopened is the writer's to decide.
#[derive(Debug, Clone)]
pub struct Failure {
    pub kind: FailureKind,
    pub what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// There was no room.
    Full,
    Io,
    /// What is stored makes no sense; the store may be well otherwise.
    Damage,
    /// The log was closed.
    Closed,
}

impl Failure {
    pub fn damage(what: impl Into<String>) -> Self {
        Self { kind: FailureKind::Damage, what: what.into() }
    }
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let kind = match &error {
            redb::Error::Io(error) => match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                    FailureKind::Full
                }
                _ => FailureKind::Io,
            },
            redb::Error::Corrupted(_) => FailureKind::Damage,
            _ => FailureKind::Io,
        };
        Self { kind, what: error.to_string() }
    }
}

impl From<Damaged> for Failure {
    fn from(Damaged: Damaged) -> Self {
        Self::damage("a row does not match its checksum")
    }
}

/// How the database file is opened. The tests put a failing disk under the log here; there is no other way to see
/// how it behaves on one.
pub type OpenFile = Box<dyn Fn(&Path) -> Result<Database, DatabaseError> + Send + Sync>;

pub fn open_file(path: &Path) -> Result<Database, DatabaseError> {
    Database::builder().set_cache_size(CACHE_BYTES).create(path)
}

pub struct Store {
    file: PathBuf,
    open_file: OpenFile,
    /// `None`: closed, or it could not be opened again yet.
    db: RwLock<Option<Database>>,
    /// Names this log in every position, so that a position of another log is noticed. Later logs have larger ones.
    epoch: u64,
    lock: File,
}

impl Store {
    pub fn open(dir: &Path, open_file: OpenFile) -> Result<Self, JournalError> {
        let directory = |source| JournalError::Directory { dir: dir.into(), source };
        fs::create_dir_all(dir).map_err(directory)?;
        let lock = File::create(dir.join(LOCK_FILE)).map_err(directory)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse(dir.into())),
            Err(TryLockError::Error(source)) => return Err(directory(source)),
        }
        let file = dir.join(FILE);
        if !file.exists() {
            create(dir, &file, &open_file).map_err(directory)??;
        }
        let db = open_database(&file, &open_file)?;
        let epoch = check(&file, &db)?;
        Ok(Self { file, open_file, db: RwLock::new(Some(db)), epoch, lock })
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Reads from one snapshot. Keep it short: no page that the snapshot sees can be used again meanwhile.
    pub fn read<T>(&self, read: impl FnOnce(&ReadTransaction) -> Result<T, Failure>) -> Result<T, Failure> {
        self.with(|db| read(&db.begin_read()?))
    }

    /// Does all of it or nothing, and returns once it is on disk. After an error it may be on disk all the same.
    pub fn write<T>(
        &self,
        write: impl FnOnce(&WriteTransaction) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.with(|db| {
            let mut transaction = db.begin_write()?;
            // Costs a second fsync a commit. Without it, redb walks the whole file after a crash (1.4 s per GiB, cached) and
            // refuses to open where one bit anywhere has flipped, or takes back the newest commit.
            transaction.set_quick_repair(true);
            let done = write(&transaction)?;
            transaction.commit()?;
            Ok(done)
        })
    }

    fn with<T>(&self, act: impl FnOnce(&Database) -> Result<T, Failure>) -> Result<T, Failure> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let Some(db) = &*db else {
            return Err(Failure { kind: FailureKind::Closed, what: "the log is not open".into() });
        };
        guarded(|| act(db))
    }

    /// Opens the database again. Readers wait meanwhile.
    pub fn reopen(&self) -> Result<(), JournalError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        close(db.take());
        let opened = open_database(&self.file, &self.open_file)?;
        match check(&self.file, &opened) {
            Ok(epoch) if epoch == self.epoch => {
                *db = Some(opened);
                Ok(())
            }
            Ok(_) => Err(JournalError::NotOurs {
                file: self.file.clone(),
                what: "another log was put in its place".into(),
            }),
            Err(error) => Err(error),
        }
    }

    pub fn close(&self) {
        close(self.db.write().unwrap_or_else(PoisonError::into_inner).take());
        // Whoever still reads holds this store, and the next one may open the log. At worst the lock goes with them.
        let _ = self.lock.unlock();
    }

    /// The number of the newest commit in the log.
    pub fn commits(&self) -> Result<u64, Failure> {
        self.read(|snapshot| {
            let log = snapshot.open_table(LOG)?;
            let row = log.get("commits")?.ok_or_else(|| Failure::damage("the number of commits is gone"))?;
            let [commits] = read_log("commits", row.value())?;
            Ok(commits)
        })
    }
}

fn close(db: Option<Database>) {
    if let Err(failure) = guarded(|| {
        drop(db);
        Ok(())
    }) {
        error!(
            what = failure.what,
            "The log's file could not be closed cleanly; opening it will recover it."
        );
    }
}

/// A panic is a failure: redb answers some damaged pages with one.
fn guarded<T>(act: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    // Nothing of ours is changed inside but what its caller throws away on an error; redb rolls itself back.
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(|text| text.to_string())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        Err(Failure::damage(format!("redb gave up on it: {what}")))
    })
}

fn create(dir: &Path, file: &Path, open_file: &OpenFile) -> io::Result<Result<(), JournalError>> {
    let new = dir.join(NEW_FILE);
    if new.exists() {
        fs::remove_file(&new)?;
    }
    let begun = open_database(&new, open_file)
        .and_then(|db| guarded(|| begin(&db)).map_err(|failure| JournalError::from(&new, failure)));
    if begun.is_err() {
        return Ok(begun);
    }
    fs::rename(&new, file)?;
    // The names have to survive a power cut as well as the content does.
    for dir in [Some(dir), dir.parent()].into_iter().flatten().filter(|dir| !dir.as_os_str().is_empty()) {
        File::open(dir)?.sync_all()?;
    }
    Ok(Ok(()))
}

fn open_database(file: &Path, open_file: &OpenFile) -> Result<Database, JournalError> {
    let opened = guarded(|| Ok(open_file(file))).map_err(|failure| JournalError::from(file, failure))?;
    opened.map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => {
            JournalError::InUse(file.parent().unwrap_or(file).to_path_buf())
        }
        DatabaseError::Storage(redb::StorageError::Corrupted(_) | redb::StorageError::Io(_))
            if !begins_as_redb(file) =>
        {
            JournalError::NotOurs { file: file.into(), what: "it is of another kind".into() }
        }
        other => JournalError::from(file, Failure::from(other)),
    })
}

fn begins_as_redb(file: &Path) -> bool {
    use io::Read;
    let mut start = [0; 4];
    // A file that cannot be read is not called foreign: the error of opening it says more.
    File::open(file)
        .and_then(|mut file| file.read_exact(&mut start))
        .map_or_else(|error| error.kind() != io::ErrorKind::UnexpectedEof, |()| start == *b"redb")
}

/// Checks that a database is a log of ours. Returns its epoch.
fn check(file: &Path, db: &Database) -> Result<u64, JournalError> {
    let head = guarded(|| {
        let log = match db.begin_read()?.open_table(LOG) {
            Ok(log) => log,
            Err(redb::TableError::Storage(error)) => return Err(error.into()),
            Err(_) => return Ok(None),
        };
        let Some(row) = log.get("head")? else { return Ok(None) };
        Ok(Some(read_log("head", row.value())?))
    });
    match head.map_err(|failure| JournalError::from(file, failure))? {
        Some([format, _]) if format > FORMAT => Err(JournalError::Newer { file: file.into(), format }),
        Some([format, epoch]) => {
            if format < FORMAT {
                guarded(|| upgrade(db, epoch)).map_err(|failure| JournalError::from(file, failure))?;
            }
            Ok(epoch)
        }
        None => {
            let what = "it is a database of somebody else's, or its tables are gone".into();
            Err(JournalError::NotOurs { file: file.into(), what })
        }
    }
}

/// From format 1, all at once.
fn upgrade(db: &Database, epoch: u64) -> Result<(), Failure> {
    let mut transaction = db.begin_write()?;
    transaction.set_quick_repair(true);
    let mut groups = transaction.open_table(GROUPS)?;
    let mut cursors = Vec::new();
    for entry in groups.iter()? {
        let (key, row) = entry?;
        let (id, name) = key.value();
        cursors.push((id, name.to_owned(), Cursor::read_bits(id, name, row.value())?));
    }
    for (id, name, cursor) in cursors {
        groups.insert((id, name.as_str()), &*cursor.row(id, &name))?;
    }
    drop(groups);
    transaction.open_table(LOG)?.insert("head", &*log_row("head", &[FORMAT, epoch]))?;
    transaction.commit()?;
    info!("The log was brought to format {FORMAT}.");
    Ok(())
}

fn begin(db: &Database) -> Result<(), Failure> {
    let epoch = (Timestamp::now().as_millis() as u64) << 16 | u64::from(fastrand::u16(..));
    let mut transaction = db.begin_write()?;
    transaction.set_quick_repair(true);
    transaction.open_table(RECORDS)?;
    transaction.open_table(TOPICS)?;
    transaction.open_table(TIMES)?;
    transaction.open_table(GROUPS)?;
    let mut log = transaction.open_table(LOG)?;
    log.insert("head", &*log_row("head", &[FORMAT, epoch]))?;
    log.insert("commits", &*log_row("commits", &[0]))?;
    drop(log);
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::journal::record::{decode, record_key, seal, unseal};
    use crate::lane::journal::rows::group_key;

    #[test]
    fn a_log_of_the_first_format_opens_and_reads() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        let db = open_file(&file).unwrap();
        begin(&db).unwrap();
        let transaction = db.begin_write().unwrap();
        let old = log_row("head", &[1, 77]);
        transaction.open_table(LOG).unwrap().insert("head", &*old).unwrap();
        // A record as format 1 wrote them: an id, a key, one header. A group that has 1 and 2, and 4.
        let mut row = Vec::new();
        seal(&mut row, &record_key(1, 1), |body| {
            body.extend_from_slice(&[1, 1 | 4]);
            body.extend_from_slice(&5i64.to_le_bytes());
            body.extend_from_slice(&[9; 16]);
            body.extend_from_slice(b"\x01k\x01\x01a\x01bhello");
        });
        transaction.open_table(RECORDS).unwrap().insert((1, 1), &*row).unwrap();
        seal(&mut row, &group_key(1, "g"), |body| {
            body.extend_from_slice(&3u64.to_le_bytes());
            body.push(0b10);
        });
        transaction.open_table(GROUPS).unwrap().insert((1, "g"), &*row).unwrap();
        transaction.commit().unwrap();
        drop(db);

        for _ in 0..2 {
            let store = Store::open(dir.path(), Box::new(open_file)).unwrap();
            assert_eq!(store.epoch(), 77);
            let (head, message, cursor) = store
                .read(|snapshot| {
                    let head = read_log("head", snapshot.open_table(LOG)?.get("head")?.unwrap().value())?;
                    let records = snapshot.open_table(RECORDS)?;
                    let message = decode(unseal(&record_key(1, 1), records.get((1, 1))?.unwrap().value())?)?;
                    let groups = snapshot.open_table(GROUPS)?;
                    let cursor = Cursor::read(1, "g", groups.get((1, "g"))?.unwrap().value())?;
                    Ok((head, message, cursor))
                })
                .unwrap();
            assert_eq!(head, [FORMAT, 77]);
            assert_eq!((&*message.payload, message.key.as_deref()), (&b"hello"[..], Some("k")));
            assert_eq!(message.deliver_at, None);
            assert_eq!([1, 2, 3, 4, 5].map(|seq| cursor.has(seq)), [true, true, false, true, false]);
            store.close();
        }
    }
}
