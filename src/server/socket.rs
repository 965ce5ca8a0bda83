//! A client's socket, which ends so that the client can read what it was told last.
//!
//! Closing a socket with bytes unread resets the connection, and the reset destroys what the other side has not read
//! yet: the 1009 or the 413 that says not to send such a message again. So our direction is closed first, and what
//! still comes is read and thrown away, for a short time.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

/// How long the other side may take to read its goodbye and hang up.
const LINGER: Duration = Duration::from_secs(1);

pub struct Socket {
    /// Present until it is dropped.
    stream: Option<TcpStream>,
    tasks: TaskTracker,
}

impl Socket {
    /// What it still does after it was dropped, it does on `tasks`.
    pub fn new(stream: TcpStream, tasks: TaskTracker) -> Self {
        Self { stream: Some(stream), tasks }
    }

    fn stream(self: Pin<&mut Self>) -> io::Result<Pin<&mut TcpStream>> {
        let stream = self.get_mut().stream.as_mut();
        stream.map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let (Some(stream), Ok(runtime)) = (self.stream.take(), Handle::try_current()) {
            self.tasks.spawn_on(linger(stream), &runtime);
        }
    }
}

async fn linger(mut stream: TcpStream) {
    let goodbye = async {
        stream.shutdown().await?;
        let mut thrown_away = [0; 4096];
        while stream.read(&mut thrown_away).await? > 0 {}
        io::Result::Ok(())
    };
    // Whoever hangs up, resets, or goes on for too long: there is nothing left to tell.
    let _ = tokio::time::timeout(LINGER, goodbye).await;
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}
